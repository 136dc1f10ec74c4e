"""How often what was evicted is asked for again."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.regret import Regret

some_keys = st.lists(st.integers(0, 30), max_size=12, unique=True)


def keys(numbers: Sequence[int]) -> list[bytes]:
    """Spread evenly, as a hash spreads them."""
    return [random.Random(number).randbytes(16) for number in numbers]


class Model:
    """The same by the book, for few ghosts: none is left out, and nothing fades."""

    def __init__(self) -> None:
        self.ghosts: list[int] = []
        self.asked_again = self.known = 0

    def evicted(self, numbers: Sequence[int], held: int) -> None:
        for number in numbers:
            self.ghosts = [*(each for each in self.ghosts if each != number), number]
        while len(self.ghosts) > held:
            self.ghosts.pop(0)
            self.known += 1

    def asked(self, numbers: Sequence[int], depth: int) -> None:
        for at, number in enumerate(numbers):
            if number in self.ghosts:
                self.ghosts.remove(number)
                self.asked_again += at >= depth
                self.known += at >= depth


steps = st.lists(st.tuples(st.booleans(), some_keys, st.integers(0, 20)), max_size=40)


@given(steps)
def test_it_counts_ghosts_by_the_book(taken: list[tuple[bool, list[int], int]]) -> None:
    """As many ghosts as blocks are held; each is asked for again, or forgotten, or held again."""
    regret, model = Regret(), Model()
    for evicts, numbers, of in taken:
        if evicts:
            regret.evicted(keys(numbers), of)
            model.evicted(numbers, of)
        else:
            regret.asked(keys(numbers), of)
            model.asked(numbers, of)
    expected = model.asked_again / (model.known + 64.0)
    assert regret.chance == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("max_ghosts", [500, 100_000])
def test_the_chance_is_the_share_that_is_asked_for(share: float, max_ghosts: int) -> None:
    """Of blocks that leave caches of 4,000 a part is asked for soon; bounded memory changes
    nothing, since keys are left out by their own bits."""
    rng, regret = random.Random(7), Regret(max_ghosts)
    for _ in range(60_000):
        key = [rng.randbytes(16)]
        regret.evicted(key, 4000)
        if rng.random() < share:
            regret.asked(key, 0)
    assert regret.chance == pytest.approx(share, abs=0.06)
    # While fewer keys begin to be followed, what was there is gone through a little at a time.
    assert len(regret) <= 1.5 * max_ghosts


def test_without_evidence_nothing_is_regretted() -> None:
    """A cluster that has evicted nothing, and one of whose evictions little is known."""
    assert Regret().chance == 0.0
    regret = Regret()
    regret.evicted(keys([1, 2]), 10)
    regret.asked(keys([1, 2]), 0)
    assert regret.chance < 0.05


def test_what_another_replica_still_has_was_not_lost() -> None:
    """A block that left one paged KV and is asked for while another has it."""
    regret = Regret()
    regret.evicted(keys(range(100)), 1000)
    regret.asked(keys(range(100)), 100)
    assert regret.chance == 0.0


def test_what_was_true_long_ago_fades() -> None:
    """Once nobody asks any more, the chance goes down."""
    regret = Regret()
    rng = random.Random(3)
    for _ in range(20_000):
        key = [rng.randbytes(16)]
        regret.evicted(key, 10)
        regret.asked(key, 0)
    high = regret.chance
    for _ in range(40_000):
        regret.evicted([rng.randbytes(16)], 10)
    assert high > 0.9
    assert regret.chance < 0.02


def test_no_call_goes_through_all_ghosts() -> None:
    """The catalogue answers nobody meanwhile. Ghosts are many and then too many, and then the
    caches shrink: each call takes or drops some for each key that it brings, and no more."""
    regret, rng, most = Regret(max_ghosts=20_000), random.Random(5), 0
    for number in range(2500):
        before, below = len(regret), regret._below
        regret.evicted([rng.randbytes(16) for _ in range(16)], 10**6 if number < 2000 else 10)
        most = max(most, abs(len(regret) - before))
    assert below < 1 << 64
    assert most <= 256
    assert len(regret) < 1000
