"""Where a prompt is split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.split import Sides, best_split

SECONDS = st.floats(-5.0, 20.0)
RATE = st.floats(0.0, 0.01)
CURVATURE = st.floats(0.0, 1e-5)
PRICE = RATE | st.floats(-0.02, 0.01)
SIDES = st.tuples(SECONDS, RATE, CURVATURE, SECONDS, RATE, PRICE, CURVATURE)


def sides(*terms: float) -> Sides:
    return Sides(*(np.array([term]) for term in terms))


def split(made: Sides, low: int, high: int, block_tokens: int) -> float:
    found = best_split(made, np.array([float(low)]), np.array([float(high)]), block_tokens)
    return float(found[0])


@given(SIDES, st.integers(1, 64), st.integers(0, 40), st.integers(0, 40))
def test_no_block_boundary_costs_less(
    terms: tuple[float, ...], block_tokens: int, first: int, more: int
) -> None:
    """Against all of them; the split is one of them."""
    made, low, high = sides(*terms), first * block_tokens, (first + more) * block_tokens
    found = split(made, low, high, block_tokens)
    assert low <= found <= high
    assert found % block_tokens == 0
    all_of_them = np.arange(low, high + 1, block_tokens, dtype=np.float64)
    least = float(made.cost(all_of_them).min())
    assert float(made.cost(np.array([found]))[0]) <= least + 1e-9 * max(1.0, abs(least))


def test_equal_sides_share_the_prompt() -> None:
    """Where a token costs the same on both, each gets half of them."""
    assert split(sides(0.0, 1e-3, 0.0, 2.048, 1e-3, 0.0, 0.0), 32, 2016, 32) == 1024


def test_a_queue_moves_the_split_to_the_other_side() -> None:
    """By half of the tokens that could be computed, or fetched, meanwhile."""
    assert split(sides(0.512, 1e-3, 0.0, 2.048, 1e-3, 0.0, 0.0), 32, 2016, 32) == 768
    assert split(sides(0.0, 1e-3, 0.0, 2.56, 1e-3, 0.0, 0.0), 32, 2016, 32) == 1280


def test_compute_that_is_charged_for_is_used_less() -> None:
    """Down to where the next token's charge is what it saves; not at all above."""
    free = (0.0, 1e-3, 0.0, 2.048, 1e-3)
    assert split(sides(*free, 0.0, 1e-6), 32, 2016, 32) == 512
    assert split(sides(*free, 2e-3, 0.0), 32, 2016, 32) == 32


def test_fetching_that_is_charged_for_is_used_less() -> None:
    """The head is computed on where that costs less than what fetching is charged for."""
    free = (0.0, 1e-3, 0.0, 2.048, 1e-3)
    assert split(sides(*free, -1e-3, 0.0), 32, 2016, 32) == 1024
    assert split(sides(*free, -2e-3, 0.0), 32, 2016, 32) == 2016
    assert split(sides(0.0, 0.0, 1e-6, 1.0, 1e-3, -3e-3, 0.0), 32, 2016, 32) == 1504


@pytest.mark.parametrize("terms", [(0.0,) * 7, (1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0)])
def test_sides_that_cost_the_same_everywhere_are_split_at_once(terms: tuple[float, ...]) -> None:
    """Nothing is gained by computing more."""
    assert split(sides(*terms), 64, 640, 32) == 64


def test_pairs_are_answered_each_for_itself() -> None:
    """Rows and columns broadcast, and answer as alone."""
    slow, quick = np.array([[1e-3], [2e-3]]), np.array([[1e-3, 4e-3, 5e-4]])
    zero = np.zeros((1, 1))
    made = Sides(zero, slow, zero, 2048 * quick, quick, zero, zero)
    low, high = np.full((2, 3), 32.0), np.full((2, 3), 2016.0)
    found = best_split(made, low, high, 32)
    assert found.shape == (2, 3)
    for (d, p), tokens in np.ndenumerate(found):
        alone = sides(0.0, slow[d, 0], 0.0, 2048 * quick[0, p], quick[0, p], 0.0, 0.0)
        assert split(alone, 32, 2016, 32) == tokens
