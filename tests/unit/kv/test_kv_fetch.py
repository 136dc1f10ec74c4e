import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.fetch import GUESSES, FetchCost
from kv.promoted import Promoted

GUESS = LinkCurve(0.01, 1e-9)
GIB = 2**30


def test_a_guess_is_what_is_told_until_something_was_seen() -> None:
    """And a fetch of nothing, or in no time, is nothing seen."""
    cost = FetchCost(GUESS)
    cost.saw(0, 1.0, 1.0)
    cost.saw(GIB, 0.0, 1.0)
    assert cost.curve(2.0) == GUESS


@given(st.floats(1e-10, 7e-9), st.integers(1, 60))
def test_what_is_seen_often_is_what_is_told(per_byte_s: float, seconds: int) -> None:
    """Whatever the tier's speed, within a tenth."""
    cost = FetchCost(GUESS)
    for n in range(200):
        cost.saw(GIB, GIB * per_byte_s, float(seconds + n))
    told = cost.curve(seconds + 199.0)
    assert told.seconds(GIB) == pytest.approx(GIB * per_byte_s, rel=0.1)
    assert told.latency_s < 2.0 * GUESS.latency_s
    assert cost.samples == 200


def test_bounds_count_only_where_they_say_something() -> None:
    """A fetch that was noticed late is no slow one, and a copy that was fast no fast fetch; what
    copying alone took is never undercut."""
    cost = FetchCost(GUESS)
    for _ in range(10):
        cost.saw_at_most(GIB, 10.0, 0.0)
        cost.saw_at_least(GIB, 0.01, 0.0)
    assert cost.curve(0.0) == GUESS
    assert cost.samples == 0
    for _ in range(10):
        cost.saw_at_least(GIB, 10.0, 0.0)
    assert cost.curve(0.0).seconds(GIB) == pytest.approx(10.0, rel=0.1)
    for _ in range(10):
        cost.saw_at_most(GIB, 0.5, 0.0)
    assert cost.curve(0.0).seconds(GIB) == pytest.approx(0.5, rel=0.1)


def test_one_fetch_that_hung_does_not_shut_a_tier() -> None:
    """Half a minute for a megabyte counts as a slow megabyte."""
    cost = FetchCost(GUESS)
    cost.saw(2**20, 30.0, 0.0)
    assert cost.curve(0.0).seconds(GIB) < 1.5 * GUESS.seconds(GIB)


def test_a_tier_that_stays_slow_is_known_to_be() -> None:
    """The limit of one fetch is no limit of many."""
    cost = FetchCost(GUESS)
    for _ in range(10):
        cost.saw(GIB, GIB * 100e-9, 0.0)
    assert cost.curve(0.0).per_byte_s > 50e-9


def test_what_was_seen_long_ago_is_forgotten() -> None:
    """A tier that nobody uses because it was slow is tried again."""
    cost = FetchCost(GUESS)
    for _ in range(10):
        cost.saw(GIB, GIB * 100e-9, 0.0)
    told = [cost.curve(after_s).per_byte_s for after_s in (0.0, 60.0, 600.0, 1200.0)]
    assert told == sorted(told, reverse=True)
    assert told[-1] == pytest.approx(GUESS.per_byte_s, rel=0.2)


def test_the_tiers_of_a_replica_have_guesses() -> None:
    """Host memory is nearer than a disk."""
    host, disk = GUESSES[Tier.HOST], GUESSES[Tier.DISK]
    assert host.seconds(GIB) < disk.seconds(GIB)


def test_a_request_waits_until_its_deadline_and_no_longer() -> None:
    """Its clock starts with the first wait; what was late once waits for nothing more."""
    promoted = Promoted()
    assert not promoted.overran(0.5, 100.0)
    assert not promoted.overran(0.5, 100.4)
    assert promoted.overran(0.5, 100.6)
    assert promoted.overran(0.5, 101.0)
    promoted.waits_since_s = None
    assert promoted.overran(0.5, 102.0)
