"""Like replicas are as fast as the fastest of them was measured."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        last = speeds.learn(replica)
    fastest = speed_of(_slowed(min(factors)))
    assert last == fastest
    assert [speeds.of(replica) for replica in replicas] == [fastest] * len(replicas)


def test_another_kind_has_a_speed_of_its_own() -> None:
    """Another device or model says nothing of this one, nor does a replica that names no kind."""
    speeds = Speeds()
    speeds.learn(_slowed(1.0))
    gpu = sim_replica("g", Role.DECODE, COSTS, hardware="gpu", step_s=7.0)
    other = sim_replica("m", Role.DECODE, COSTS, hardware="cpu", model="other", step_s=8.0)
    unknown = sim_replica("u", Role.DECODE, COSTS, step_s=9.0)
    assert [speeds.learn(r).step_s for r in (gpu, other, unknown)] == [7.0, 8.0, 9.0]
    assert speeds.of(unknown) is None


def test_one_that_measured_nothing_is_refused() -> None:
    """No plan could price it, whatever others of its kind measured."""
    speeds = Speeds()
    speeds.learn(_slowed(1.0))
    with pytest.raises(CurveError):
        speeds.learn(sim_replica("n", Role.DECODE, COSTS, prefill_samples=(), hardware="cpu"))
