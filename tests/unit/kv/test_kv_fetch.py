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


@given(st.floats(0.001, 5.0), st.floats(0.0, 5.0))
def test_between_two_bounds_nothing_is_learned_and_outside_the_nearer_one(
    least_s: float, wide_s: float
) -> None:
    """A guess that could be right stays."""
    cost = FetchCost(GUESS)
    guess_s, most_s = GUESS.seconds(GIB), least_s + wide_s
    for _ in range(20):
        cost.saw_between(GIB, least_s, most_s, 0.0)
    told_s = cost.curve(0.0).seconds(GIB)
    if least_s <= guess_s <= most_s:
        assert cost.samples == 0
        assert told_s == guess_s
    else:
        assert least_s / 1.2 < told_s < most_s * 1.2


def test_what_is_shown_is_what_was_seen_last() -> None:
    """Sixteen of them, with what each byte takes beside; made anew only when that has changed."""
    cost = FetchCost(GUESS)
    assert cost.seen() == ()
    for number in range(1, 21):
        cost.saw(number * GIB, 2.0 * number, 0.0)
    seen = cost.seen(1e-9)
    assert [n_bytes // GIB for n_bytes, _ in seen] == list(range(5, 21))
    assert seen[0][1] == pytest.approx(10.0 + 5e-9 * GIB, rel=0.01)
    assert cost.seen(1e-9) is seen
    assert cost.seen(2e-9)[0][1] > seen[0][1]
    cost.saw(GIB, 2.0, 0.0)
    assert cost.seen(2e-9)[-1][0] == GIB
