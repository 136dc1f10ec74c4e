import pytest

from kv.curve import LinkCurve, PrefillCurve, PrefillSample, TransferSample
from kv.live import KEPT, MOST_RETRY_S, RETRY_S, LiveLink, LivePrefill

LINK = LinkCurve(0.005, 1e-8)
BYTES = 46_080_000


def transfers(live: LiveLink, n: int, factor: float, at_s: float, every_s: float = 0.5) -> float:
    """`n` transfers at so many times the cost; when the last was."""
    for number in range(n):
        at_s += every_s if number else 0.0
        live.saw(TransferSample(BYTES, factor * LINK.seconds(BYTES)), at_s)
    return at_s


def off(live: LiveLink, now_s: float) -> float:
    """What is told over what it costs at its best."""
    return live.curve(now_s).seconds(BYTES) / LINK.seconds(BYTES)


def test_what_was_measured_is_told_until_something_is_seen() -> None:
    """To two digits, however much later."""
    live = LiveLink(LinkCurve(0.00512, 1.04e-8), BYTES)
    assert live.curve(0.0) == live.curve(1e6) == LinkCurve(0.0051, 1e-8)
    assert live.samples == 0
    assert not live.fades


def test_a_link_that_becomes_slow_is_known_to_be_after_three_transfers() -> None:
    """And as long as it is used, it stays known."""
    live = LiveLink(LINK, BYTES)
    transfers(live, 20, 1.0, 0.0)
    at_s = transfers(live, 3, 10.0, 100.0)
    assert off(live, at_s) == pytest.approx(10.0, rel=0.1)
    at_s = transfers(live, 200, 10.0, at_s)
    assert off(live, at_s) == pytest.approx(10.0, rel=0.1)


def test_a_slow_link_that_nobody_uses_is_tried_again() -> None:
    """Within seconds it is told as nearly as good as it was, and never as better."""
    live = LiveLink(LINK, BYTES)
    at_s = transfers(live, 3, 10.0, 0.0)
    told = [off(live, at_s + after_s) for after_s in (0.0, 1.0, RETRY_S, 20.0, 60.0)]
    assert told == sorted(told, reverse=True)
    assert told[3] < 2.0
    assert told[4] == pytest.approx(1.0, rel=0.2)
    assert told[4] > 0.95


def test_nothing_is_tried_again_where_that_is_not_wanted() -> None:
    """What became slow is told as slow for ever, and follows what is seen all the same."""
    live = LiveLink(LINK, BYTES, None)
    at_s = transfers(live, 4, 10.0, 0.0)
    assert off(live, at_s + 1e6) == off(live, at_s) == pytest.approx(10.0, rel=0.1)
    assert not live.fades
    at_s = transfers(live, 4, 1.0, at_s + 1e6)
    assert off(live, at_s) == pytest.approx(1.0, rel=0.1)


def test_one_good_trial_is_believed() -> None:
    """A link that has recovered is used again after a single transfer."""
    live = LiveLink(LINK, BYTES)
    at_s = transfers(live, 4, 10.0, 0.0) + 20.0
    live.saw(TransferSample(BYTES, LINK.seconds(BYTES)), at_s)
    assert off(live, at_s) == pytest.approx(1.0, rel=0.1)


def test_each_bad_trial_doubles_the_time_to_the_next() -> None:
    """A link that is slow for good costs a trial now and then."""
    live, at_s, trials = LiveLink(LINK, BYTES), 0.0, 0
    at_s = transfers(live, 4, 10.0, at_s)
    while at_s < 3600.0:
        at_s += 1.0
        if off(live, at_s) < 2.0:
            live.saw(TransferSample(BYTES, 10.0 * LINK.seconds(BYTES)), at_s)
            trials += 1
    assert 4 <= trials <= 12
    assert off(live, at_s + 3.0 * MOST_RETRY_S) < 2.5


def test_small_prompts_that_were_fast_are_not_what_long_ones_are_at_their_best() -> None:
    """Three of 5 tokens at a sixth make long ones look as cheap until those are seen; then they
    are not told as that cheap again."""
    true = PrefillCurve(0.007, 4e-5, 2e-9)
    live = LivePrefill(true)
    for number in range(3):
        assert not live.saw(PrefillSample(5, 64, true.seconds(5, 64) / 6.0), float(number))
    for number in range(3, 9):
        live.saw(PrefillSample(3000, 0, true.seconds(3000, 0)), float(number))
    for now_s in (9.0, 3600.0):
        assert live.curve(now_s).seconds(3000, 0) == pytest.approx(true.seconds(3000, 0), rel=0.3)


def test_small_prompts_tell_nothing_of_long_ones_where_the_constant_is_most_of_both() -> None:
    """They cost about as much, and still bear out nothing."""
    true = PrefillCurve(0.03, 8e-6, 5e-9)
    live = LivePrefill(true)
    assert not any(
        live.saw(PrefillSample(5, 64, true.seconds(5, 64)), float(at_s)) for at_s in range(9)
    )
    assert live.saw(PrefillSample(900, 0, true.seconds(900, 0)), 9.0)


def test_small_trials_of_a_slow_link_are_rare_too_where_the_constant_is_most_of_it() -> None:
    """Each that fails doubles the time to the next."""
    link, n_bytes, trials = LinkCurve(0.5, 1e-9), BYTES // 1000, 0
    live = LiveLink(link, BYTES)
    bad = TransferSample(n_bytes, 10.0 * link.seconds(n_bytes))
    for at_s in range(4):
        live.saw(bad, float(at_s))
    for at_s in range(4, 3600):
        if live.curve(at_s).seconds(n_bytes) < 2.0 * link.seconds(n_bytes):
            live.saw(bad, float(at_s))
            trials += 1
    assert 4 <= trials <= 12


def test_small_prompts_do_not_keep_a_replica_from_long_ones() -> None:
    """Whose tokens were dear is tried again, however many small prompts come meanwhile, which show
    nothing of it."""
    true = PrefillCurve(0.007, 4e-5, 2e-9)
    live, at_s = LivePrefill(true), 0.0
    for at_s in range(4):
        live.saw(PrefillSample(3000, 0, 10.0 * true.seconds(3000, 0)), at_s)
    assert live.curve(at_s).seconds(3000, 0) > 5.0 * true.seconds(3000, 0)
    for at_s in range(4, 40):
        live.saw(PrefillSample(5, 64, live.curve(at_s).seconds(5, 64)), at_s)
    assert live.curve(at_s).seconds(3000, 0) < 2.0 * true.seconds(3000, 0)


def test_a_trial_that_hung_says_nothing_yet() -> None:
    """A single bad transfer after a pause does not shut a good link."""
    live = LiveLink(LINK, BYTES)
    at_s = transfers(live, 20, 1.0, 0.0) + 100.0
    live.saw(TransferSample(BYTES, 50.0 * LINK.seconds(BYTES)), at_s)
    assert off(live, at_s) < 1.2


def test_a_link_that_is_used_at_its_new_cost_is_not_told_as_better_for_ever() -> None:
    """What it was at its best is forgotten with the samples that say otherwise."""
    live = LiveLink(LINK, BYTES)
    at_s = transfers(live, 400, 3.0, 0.0)
    assert off(live, at_s + 3600.0) == pytest.approx(3.0, rel=0.15)


def test_a_probe_on_busy_cores_is_mended() -> None:
    """Three prompts at half the cost, of whatever length, and what was measured is not told
    again."""
    true = PrefillCurve(0.02, 0.002, 1e-7)
    live = LivePrefill(PrefillCurve(0.04, 0.004, 2e-7))
    for number, new in enumerate((700, 120, 1500)):
        live.saw(PrefillSample(new, 200, true.seconds(new, 200)), float(number))
    for now_s in (2.0, 3600.0):
        assert live.curve(now_s).seconds(900, 0) == pytest.approx(true.seconds(900, 0), rel=0.15)
    assert live.samples == 3


def test_the_last_samples_are_kept_to_be_shown() -> None:
    """By their terms, and no more than some."""
    live = LivePrefill(PrefillCurve(0.02, 0.002, 1e-7))
    for new in range(1, 2 * KEPT + 1):
        live.saw(PrefillSample(new, 10, 0.5), 0.0)
    assert len(live.points) == KEPT
    assert live.seen() == [(new, 10, 0.5) for new in range(KEPT + 1, 2 * KEPT + 1)]
    assert live.samples == 2 * KEPT
    link = LiveLink(LINK, BYTES)
    link.saw(TransferSample(BYTES, 0.25), 0.0)
    assert link.seen() == [(BYTES, 0.25)]
