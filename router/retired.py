"""What replicas that left have counted: sums of counters must not fall."""

from collections.abc import Sequence
from typing import NamedTuple

from workers.messages import Totals

# Replicas that are told apart after they left.
MOST = 256


class Counts(NamedTuple):
    """What an engine counted, over which of UCX's lanes."""

    lanes: tuple[str, ...]
    totals: Totals


class Retired:
    """By epoch: one that only hung comes back with its counts. Of more than `most` the oldest are
    one sum for each kind of lanes, so that a cluster whose replicas come and go needs no more."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._counts: dict[str, Counts] = {}
        self._sums: dict[tuple[str, ...], Totals] = {}

    def left(self, epoch: str, counts: Counts) -> None:
        """This engine is gone."""
        self._counts.pop(epoch, None)
        self._counts[epoch] = counts
        while len(self._counts) > self._most:
            lanes, totals = self._counts.pop(next(iter(self._counts)))
            self._sums[lanes] = _sum(self._sums.get(lanes, Totals()), totals)

    def back(self, epoch: str) -> Counts | None:
        """This engine is here again, and goes on from these; None for one that is new."""
        return self._counts.pop(epoch, None)

    def all(self) -> Sequence[Counts]:
        """Of everybody who is not here."""
        return *self._counts.values(), *(Counts(*each) for each in self._sums.items())


def _sum(one: Totals, other: Totals) -> Totals:
    names = Totals.__struct_fields__
    return Totals(**{name: getattr(one, name) + getattr(other, name) for name in names})
