"""What a plan is ranked by: each class of requests has prices of its own.

A price is the seconds of a person's waiting that a second of something is worth. What a plan does
to those who run beside it costs the same in both classes: they are people.
"""

from typing import NamedTuple

from router.columns import ENTRY_S, OWN_S, QUEUE_S, WAITING_S, YIELDING, Columns, Floats
from router.policy.question import Question


class Objective(NamedTuple):
    """Prices of the request's own `waiting`, of `computing` for it, of `moving` bytes for it."""

    waiting: float
    computing: float
    moving: float

    @property
    def transfer(self) -> float:
        """Of a second in which bytes are moved and the request waits for them."""
        return self.waiting + self.moving

    def weigh(self, loads: Floats, streams: Floats) -> Floats:
        """What a second of computing costs on each replica, where so many `streams` stall."""
        weight: Floats = streams + (self.waiting + self.computing)
        if self.waiting < 1.0:
            # The other batch requests there will be as long as this one, for all that is known.
            weight += self.waiting * loads[YIELDING]
        return weight

    def priced(self, columns: Columns) -> Columns:
        """The same columns with what is waited for, and what is moved, at these prices."""
        if self.transfer == 1.0:
            return columns
        loads, links, tiers = columns.loads.copy(), columns.links, columns.tiers
        saved = (1.0 - self.waiting) * loads[[QUEUE_S, WAITING_S, WAITING_S, QUEUE_S]]
        loads[[QUEUE_S, WAITING_S, ENTRY_S, OWN_S]] -= saved
        if tiers is not None:
            tiers = tiers._replace(
                latency_s=tiers.latency_s * self.transfer,
                per_byte_s=tiers.per_byte_s * self.transfer,
            )
        links = links._replace(
            latency_s=links.latency_s * self.transfer, per_byte_s=links.per_byte_s * self.transfer
        )
        return columns._replace(loads=loads, links=links, tiers=tiers)


# Computing first: a full price for it, and a twentieth of a person's for waiting, by which replicas
# that cost the same are told apart. Moving takes no replica's time.
BATCH = Objective(0.05, 1.0, 0.1)


def objective(question: Question) -> Objective:
    """The prices of a request's class."""
    if question.yields:
        return BATCH
    return Objective(1.0, question.compute_price, question.moving_price)
