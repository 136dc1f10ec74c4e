"""Exploration: now and then a plan that is not the cheapest, for what it tells.

A curve is refitted by the requests that use it, so one that was held dear from the start, by a
guess or by an unlucky probe, is never used and never found out. A small share of requests takes,
instead of the cheapest plan, one of about its cost that stands on a curve nobody has used of late.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kv.catalogue import Tier
from kv.plan import Plan, Shape

# A plan that is tried costs at most so many times as much as the cheapest. What became dearer than
# that since it was at its best comes back by itself (`kv.live.WORSE`).
MOST_COST = 1.5

# What a plan stands on: ("prefill", replica), ("link", P, D), or ("fetch", replica, tier), which is
# of blocks that others lend where the tier is a peer's.
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
    """The curves by which a plan was priced, and that carrying it out refits.

    That of whoever computes, but not of D in a split, whose seconds are P's too; the link of a
    handoff; the tier that a prefix comes from, if nothing else brings any: what several bring tells
    of none of them. Of a split's fetches the head's is told apart, since it comes from a peer.
    """
    yield "prefill", plan.prefill or plan.decode
    if plan.shape is Shape.SPLIT:
        yield "fetch", plan.decode, Tier.PEER
        return
    if plan.prefill is not None:
        yield "link", plan.prefill, plan.decode
    fetched = [(span.replica, span.tier) for span in plan.spans if span.tier is not None]
    if len(fetched) == 1 and plan.hints.peer is None:
        yield "fetch", *fetched[0]
