"""What the grid's rows say of samples."""

from itertools import product
from math import prod

import pytest

from benchmarks.breakeven.cells import (
    COMPUTE,
    FETCH,
    OURS,
    Cell,
    crossover_tokens,
    near_crossover,
    rows,
    series,
    tuned,
)
from benchmarks.breakeven.slowed import last_wrong

PREFIXES = (256, 512, 1024, 2048, 4096)


def cell(
    prefix: int, compute_s: float, fetch_s: float, ours_s: float, suffix: int = 32, link: str = "a"
) -> Cell:
    # A hiccup in one of three turns is no median.
    ttft_s = {
        policy: [seconds, 100.0, seconds]
        for policy, seconds in ((COMPUTE, compute_s), (FETCH, fetch_s), (OURS, ours_s))
    }
    return Cell(link, "raw", prefix, suffix, ttft_s, [(ours_s * 1.1, ours_s)])


def along(share: float, link: str = "a", suffix: int = 32) -> list[Cell]:
    """Computing takes 1 ms a token; fetching 1 s, whatever it fetches: equal at 1,000 tokens. Ours
    takes a share of the better one."""
    both = [(p, 0.001 * p, 1.0) for p in PREFIXES]
    return [cell(p, c, f, share * min(c, f), suffix, link) for p, c, f in both]


def values(cells: list[Cell]) -> dict[str, tuple[float | None, bool]]:
    return {row.name: (row.value, row.ok) for row in rows(cells)}


def test_a_crossover_lies_where_both_take_as_long() -> None:
    """Between two prefixes, and nowhere where one of them is always quicker."""
    assert crossover_tokens(along(1.0)) == pytest.approx(1000, rel=0.01)
    assert crossover_tokens([cell(p, 1.0, 2.0, 1.0) for p in PREFIXES]) is None
    near = near_crossover(along(1.0), 2.0)
    assert [each.prefix_tokens for each in near] == [512, 1024]
    assert [each.prefix_tokens for each in near_crossover(along(1.0), 2**0.5)] == [1024]


def test_cells_are_compared_within_their_own_series() -> None:
    """Another suffix or another link has another crossover."""
    cells = [
        each
        for suffix, link in product((32, 512), "ab")
        for each in reversed(along(1.0, link, suffix))
    ]
    found = list(series(cells))
    assert len(found) == 4
    for each in found:
        assert [one.prefix_tokens for one in each] == list(PREFIXES)


def test_the_threshold_is_the_best_that_a_constant_can_be() -> None:
    """On one series it is the better of both everywhere; on two that cross elsewhere it is not."""
    cells = along(1.0)
    assert list(tuned(cells).values()) == [each.better_s for each in cells]
    # With the long suffix fetching always wins: one constant cannot serve both.
    other = [cell(p, 3.0, 1.0, 1.0, suffix=512) for p in PREFIXES]
    taken = tuned([*cells, *other])
    assert sum(taken[each.key] > each.better_s for each in [*cells, *other]) > 0
    # But it does as well as either rule on all, by the mean of ratios.
    for rule in (COMPUTE, FETCH):
        assert prod(taken.values()) <= prod(each.median_s(rule) for each in [*cells, *other])


def test_rows_hold_ours_against_both_and_against_the_threshold() -> None:
    """By their geometric mean, and in the worst cell; the crossover has targets of its own."""
    found = values(along(0.5))
    for name in ("ours_to_better", "ours_to_better_at_crossover", "ours_to_threshold"):
        assert found[name] == (0.5, True)
    # What ours said was a tenth more than it took.
    assert found["prediction_error_median"] == (10.0, True)
    found = values(along(0.9))
    assert found["ours_to_better"] == (0.9, True)
    assert found["ours_to_better_at_crossover"] == (0.9, False)
    assert found["ours_to_threshold"] == (0.9, True)
    assert found["ours_to_threshold_near_crossover"] == (0.9, False)


def test_the_worst_cell_may_be_late_by_a_little() -> None:
    """30 ms are nothing to anybody, however short the prompt is; a share of a long one counts."""
    short = cell(256, 0.05, 1.0, 0.07)
    assert values([short])["ours_to_better_worst"] == (1.15, True)
    long = cell(4096, 4.0, 2.0, 2.5)
    assert values([short, long])["ours_to_better_worst"] == (1.25, False)


def test_without_a_crossover_there_are_no_rows_of_one() -> None:
    """A smoke run has two prefixes, and none may lie between them."""
    found = values([cell(p, 1.0, 2.0, 1.0) for p in PREFIXES])
    assert "ours_to_better" in found
    assert not [name for name in found if "crossover" in name]


def repeat(slow: str, after: str, slow_fetch_s: float = 8.0) -> dict[str, object]:
    """Plans as letters: f fetches, c computes."""
    rules = {
        "before": {COMPUTE: {"ttft_s": 2.0}, FETCH: {"ttft_s": 0.5}},
        "slow": {COMPUTE: {"ttft_s": 2.0}, FETCH: {"ttft_s": slow_fetch_s}},
    }
    told = {"f": {"plan": "fetch; hit=0"}, "c": {"plan": "local; hit=0"}}
    phases = {"before": "ff", "slow": slow, "after": after}
    return {"rules": rules, **{name: [told[p] for p in plans] for name, plans in phases.items()}}


@pytest.mark.parametrize(
    ("slow", "after", "counts"),
    [("fffcc", "cccff", (3, 3)), ("cccc", "ffff", (0, 0)), ("fcfcc", "cfffc", (3, 5))],
)
def test_plans_are_wrong_until_the_last_wrong_one(
    slow: str, after: str, counts: tuple[int, int]
) -> None:
    """A right one before it does not count: it was luck."""
    told = repeat(slow, after)
    assert (last_wrong(told, "slow"), last_wrong(told, "after")) == counts


def test_a_change_that_changes_nothing_is_no_measurement() -> None:
    """Where both rules take as long no plan is wrong, and to say 0 would be a lie."""
    with pytest.raises(ValueError, match="slow: 2"):
        last_wrong(repeat("c", "f", slow_fetch_s=2.1), "slow")
