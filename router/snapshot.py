"""An immutable view of the cluster, made for one request."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

from kv.curve import LinkCurve, PrefillCurve
from router.columns import Columns, Floats


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One routable replica.

    `queued_tokens` are prompt tokens of `queued_prefills` other requests that it has still to
    compute; `hit_tokens` is how much of this request's prompt its paged KV holds.
    """

    name: str
    curve: PrefillCurve
    step_s: float
    queued_prefills: int
    queued_tokens: int
    waiting: int
    running: int
    max_num_seqs: int
    hit_tokens: int

    @property
    def queue_s(self) -> float:
        """Until the replica has computed what it was given before."""
        waiting_s = self.waiting * self.step_s
        if not self.queued_tokens:
            return waiting_s
        # Each prompt is a prefill of its own: one of their sum would cost its square.
        prefills = max(1, self.queued_prefills)
        return waiting_s + prefills * self.curve.seconds(self.queued_tokens // prefills, 0)

    @property
    def crowding_s(self) -> float:
        """What one more stream costs those that run: spreads streams over idle replicas."""
        full = self.running >= self.max_num_seqs
        return self.running * self.step_s * (self.max_num_seqs if full else 1)


class Pool(Sequence[ReplicaView]):
    """Replicas of one role by name: rows that outlive a request, and its hits, float64 a row."""

    __slots__ = ("_hit_tokens", "_rows")

    def __init__(self, rows: Sequence[ReplicaView], hit_tokens: Floats) -> None:
        self._rows, self._hit_tokens = rows, hit_tokens

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> ReplicaView: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[ReplicaView]: ...
    def __getitem__(self, at: int | slice) -> ReplicaView | Sequence[ReplicaView]:
        if isinstance(at, slice):
            return Pool(self._rows[at], self._hit_tokens[at])
        return replace(self._rows[at], hit_tokens=int(self._hit_tokens[at]))

    def __iter__(self) -> Iterator[ReplicaView]:
        return (self[at] for at in range(len(self)))

    def __repr__(self) -> str:
        return f"Pool({list(self)})"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a plan is made from. `links` holds the warmed (prefill, decode) pairs only.

    `columns` are the same once more for pricing all plans at once, if whoever makes the snapshot
    keeps them. `blind`: the catalogue did not answer, so that hits of 0 mean nothing.
    """

    prefill: Sequence[ReplicaView]
    decode: Sequence[ReplicaView]
    links: Mapping[tuple[str, str], LinkCurve]
    kv_bytes_per_token: int
    columns: Columns | None = None
    blind: bool = False

    def without(self, names: Collection[str]) -> "Snapshot":
        """The same view less some replicas; the decode replicas stay if no other is there."""
        if not names:
            return self
        prefill = tuple(view for view in self.prefill if view.name not in names)
        decode = tuple(view for view in self.decode if view.name not in names)
        return replace(self, prefill=prefill, decode=decode or tuple(self.decode), columns=None)
