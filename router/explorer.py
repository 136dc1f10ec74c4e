"""Which requests may explore, and which curves this ingress has used of late."""

import random
from collections.abc import Callable

from kv.plan import Plan
from router.policy.explore import Curve, Exploration, curves

# A curve that was not used for so long is stale: each is explored once in this time at most.
STALE_S = 300.0


class Explorer:
    """Gives a `share` of requests the chance to try another plan than the cheapest."""

    def __init__(self, share: float, now: Callable[[], float], rng: random.Random) -> None:
        self._share, self._now, self._random = share, now, rng
        self._used_s: dict[Curve, float] = {}

    def exploration(self) -> Exploration | None:
        """What the next request may try; None for most."""
        if self._random.random() >= self._share:
            return None
        stale_s = self._now() - STALE_S
        # What is stale is as good as never used: nothing is kept of replicas that left.
        self._used_s = {curve: at for curve, at in self._used_s.items() if at > stale_s}
        return Exploration(self._random.random(), frozenset(self._used_s))

    def uses(self, plan: Plan, yields: bool = False) -> None:
        """A plan is about to be carried out. Where its request gives way it moves no curve."""
        if self._share and not yields:
            self._used_s.update(dict.fromkeys(curves(plan), self._now()))
