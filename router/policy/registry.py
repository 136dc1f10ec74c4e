"""Which function is which policy."""

from collections.abc import Callable, Mapping

from kv.plan import Plan
from router.policy import Policy, least_loaded, pair, prefix_affinity, round_robin, threshold
from router.policy.question import Question

# Raises `NoReplicaError` when no decode replica is routable.
Choose = Callable[[Question], Plan]

CHOOSE: Mapping[Policy, Choose] = {
    Policy.BREAKEVEN: pair.choose,
    Policy.LEAST_LOADED: least_loaded.choose,
    Policy.PREFIX_AFFINITY: prefix_affinity.choose,
    Policy.ROUND_ROBIN: round_robin.choose,
    Policy.THRESHOLD: threshold.choose,
    Policy.ALWAYS_FETCH: threshold.always_fetch,
    Policy.ALWAYS_COMPUTE: threshold.always_compute,
}
