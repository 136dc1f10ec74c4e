"""Like replicas are as fast as the fastest of them was measured."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.curve import PrefillSample
from kv.errors import CurveError
from router.speed import Speeds, speed_of
from workers.messages import Replica, Role
from workers.sim import SimCosts, sim_replica

COSTS = SimCosts()


def _slowed(factor: float) -> Replica:
    """A replica whose probes took so many times as long as they should."""
    like = sim_replica("decode-0", Role.DECODE, COSTS, hardware="cpu")
    samples = tuple((new, cached, s * factor) for new, cached, s in like.prefill_samples)
    step_s = COSTS.step_s * factor
    return msgspec.structs.replace(like, prefill_samples=samples, step_s=step_s)


@given(st.lists(st.floats(1.0, 10.0), min_size=1, max_size=6))
def test_all_of_a_kind_are_as_fast_as_the_fastest(factors: list[float]) -> None:
    """In whatever order they come, and whichever was disturbed at its start."""
    speeds = Speeds()
    replicas = [_slowed(factor) for factor in factors]
    for replica in replicas:
        speeds.learn(replica)
    fastest = speed_of(_slowed(min(factors)))
    assert [speeds.of(replica, 0.0) for replica in replicas] == [fastest] * len(replicas)


def test_another_kind_has_a_speed_of_its_own() -> None:
    """Another device or model says nothing of this one, nor does a replica that names no kind."""
    speeds = Speeds()
    speeds.learn(_slowed(1.0))
    gpu = sim_replica("g", Role.DECODE, COSTS, hardware="gpu", step_s=7.0)
    other = sim_replica("m", Role.DECODE, COSTS, hardware="cpu", model="other", step_s=8.0)
    unknown = sim_replica("u", Role.DECODE, COSTS, step_s=9.0)
    for replica in (gpu, other, unknown):
        speeds.learn(replica)
    assert [speeds.of(r, 0.0).step_s for r in (gpu, other, unknown)] == [7.0, 8.0, 9.0]


def test_one_that_measured_nothing_is_refused() -> None:
    """No plan could price it, whatever others of its kind measured."""
    speeds = Speeds()
    speeds.learn(_slowed(1.0))
    with pytest.raises(CurveError):
        speeds.learn(sim_replica("n", Role.DECODE, COSTS, prefill_samples=(), hardware="cpu"))


def test_requests_tell_of_the_replica_that_served_them() -> None:
    """One of a kind becomes slower, another is as it was; a new engine of that name too, and what
    is known of one that left is forgotten."""
    speeds = Speeds()
    slow, like = (msgspec.structs.replace(_slowed(1.0), epoch=epoch) for epoch in "ab")
    speeds.learn(slow)
    speeds.learn(like)
    measured = speeds.of(like, 0.0)
    for number in range(5):
        sample = PrefillSample(900, 100, 4.0 * COSTS.prefill.seconds(900, 100))
        speeds.saw(slow, sample, float(number))
    told = speeds.of(slow, 4.0).curve
    assert told.seconds(900, 100) == pytest.approx(sample.seconds, rel=0.1)
    assert speeds.of(like, 4.0) == measured
    restarted = msgspec.structs.replace(slow, epoch="c")
    speeds.learn(restarted)
    assert speeds.of(restarted, 4.0) == measured
    speeds.forget(slow)
    assert speeds.of(slow, 4.0) == measured


def test_small_requests_do_not_keep_what_others_of_its_kind_know_from_a_replica() -> None:
    """Both probed themselves beside others; long prompts show one of them as twice as fast, and
    the other has only had small ones: its long ones are taken to be as fast, its small ones as
    seen."""
    speeds, true = Speeds(), COSTS.prefill
    one, other = (msgspec.structs.replace(_slowed(2.0), epoch=epoch) for epoch in "ab")
    speeds.learn(one)
    speeds.learn(other)
    for number in range(4):
        speeds.saw(other, PrefillSample(8, 64, 2.0 * true.seconds(8, 64)), float(number))
    assert speeds.of(other, 4.0).curve.seconds(3000, 0) > 1.5 * true.seconds(3000, 0)
    for number, new in enumerate((2000, 3000, 1000, 2500)):
        speeds.saw(one, PrefillSample(new, 0, true.seconds(new, 0)), float(number))
    told = speeds.of(other, 4.0).curve
    assert told.seconds(3000, 0) == pytest.approx(true.seconds(3000, 0), rel=0.15)
    assert told.seconds(8, 64) > 1.5 * true.seconds(8, 64)


def test_a_probe_that_comes_later_does_not_overrule_requests() -> None:
    """Another of its kind that measured itself faster says nothing of one that requests tell of."""
    speeds = Speeds()
    replica = msgspec.structs.replace(_slowed(2.0), epoch="a")
    speeds.learn(replica)
    for number in range(5):
        sample = PrefillSample(900, 0, 3.0 * COSTS.prefill.seconds(900, 0))
        speeds.saw(replica, sample, float(number))
    before = speeds.of(replica, 4.0).curve
    speeds.learn(msgspec.structs.replace(_slowed(1.0), epoch="b"))
    assert speeds.of(replica, 4.0).curve == before


def test_what_requests_told_of_one_holds_for_all_of_its_kind_that_are_unknown() -> None:
    """A probe on busy cores was wrong of all; a replica that requests told of keeps its own, and
    one that is slower tells nothing of others."""
    speeds = Speeds()
    first, idle, slow = (msgspec.structs.replace(_slowed(2.0), epoch=name) for name in "abc")
    for replica in (first, idle, slow):
        speeds.learn(replica)
    sample = PrefillSample(900, 0, 3.0 * COSTS.prefill.seconds(900, 0))
    assert not any(speeds.saw(slow, sample, float(n)) for n in range(5))
    known = speeds.of(slow, 4.0)
    sample = PrefillSample(900, 0, COSTS.prefill.seconds(900, 0))
    assert any([speeds.saw(first, sample, float(n)) for n in range(5)])  # noqa: C419
    assert speeds.of(idle, 4.0).curve.seconds(900, 0) == pytest.approx(sample.seconds, rel=0.2)
    assert speeds.of(slow, 4.0) == known
    speeds.learn(msgspec.structs.replace(_slowed(2.0), epoch="d"))
    assert speeds.of(idle, 4.0).curve.seconds(900, 0) == pytest.approx(sample.seconds, rel=0.2)
