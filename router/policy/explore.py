"""Exploration: now and then a plan that is not the cheapest, for what it tells.

A curve is refitted by the requests that use it, so one that was held dear from the start, by a
guess or by an unlucky probe, is never used and never found out. A small share of requests takes,
instead of the cheapest plan, one of about its cost that stands on a curve nobody has used of late.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kv.plan import Plan, Shape, Source

# A plan that is tried costs at most so many times as much as the cheapest. What became dearer than
# that since it was at its best comes back by itself (`kv.live.WORSE`).
MOST_COST = 1.5

# What a plan stands on: ("prefill", replica), ("link", P, D), or ("fetch", replica, tier).
Curve = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exploration:
    """The chance to try a plan: `draw` in [0, 1) picks one, and `fresh` are the curves that were
    used of late."""

    draw: float
    fresh: frozenset[Curve]

    def tries(self, other: Plan, cheapest: Plan) -> bool:
        """Whether `other` would tell something: it stands on a curve that is not fresh, and that
        the `cheapest` would tell nothing of."""
        return not self.fresh.union(curves(cheapest)).issuperset(curves(other))


def curves(plan: Plan) -> Iterator[Curve]:
    """The curves by which a plan was priced, and that carrying it out refits."""
    for span in plan.spans:
        if span.source is Source.COMPUTE:
            yield "prefill", span.replica
        elif span.tier is not None:
            yield "fetch", span.replica, span.tier
    if plan.prefill is not None and plan.shape is not Shape.SPLIT:
        yield "link", plan.prefill, plan.decode
