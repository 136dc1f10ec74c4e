"""An immutable view of the cluster, made for one request."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import overload

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from kv.fetch import GUESSES
from router.columns import Columns, Floats, TierColumns


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier behind a replica's paged KV: how many leading tokens of this request's prompt it
    holds, and what fetching bytes from there costs; `lossy`, where a lossy codec stored them."""

    tier: Tier
    curve: LinkCurve
    hit_tokens: int = 0
    lossy: LinkCurve | None = None

    def of(self, lossy: bool) -> LinkCurve:
        """For a request that does, or does not, allow a lossy codec."""
        return self.lossy if lossy and self.lossy is not None else self.curve


class Unnamed(IntEnum):
    """Which tiers of a replica may have blocks of a prompt that nobody has told of."""

    NONE = 0
    VAULT = 1  # others store there too, and it may outlive who told of them
    OWN = 2  # of an earlier life: it does not know yet what prompts they belong to


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One routable replica.

    `queued_tokens` are prompt tokens of `queued_prefills` other requests that it has still to
    compute; `hit_tokens` is how much of this request's prompt its paged KV holds. `unnamed`:
    whether its tiers may have what nobody told of. `yielding` requests are in none of these
    figures, since they give way. `peer` is what blocks cost it that another replica lends.
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
    tiers: tuple[TierView, ...] = ()
    unnamed: Unnamed = Unnamed.NONE
    yielding: int = 0
    peer: LinkCurve = GUESSES[Tier.PEER]

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
    """Replicas of one role by name: rows that outlive a request, and its hits, float64 a row, and
    what tiers hold of it; the place of the first one among all is `first`. A `lossy` request allows
    its blocks to be."""

    __slots__ = ("_first", "_hit_tokens", "_lossy", "_rows", "_tiers")

    def __init__(
        self,
        rows: Sequence[ReplicaView],
        hit_tokens: Floats,
        tiers: TierColumns | None = None,
        first: int = 0,
        lossy: bool = False,
    ) -> None:
        self._rows, self._hit_tokens, self._lossy = rows, hit_tokens, lossy
        self._tiers, self._first = tiers, first

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> ReplicaView: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[ReplicaView]: ...
    def __getitem__(self, at: int | slice) -> ReplicaView | Sequence[ReplicaView]:
        places = range(len(self._rows))[at]
        if isinstance(places, range):
            return [self[place] for place in places]
        row = self._rows[places]
        if self._tiers is None and not self._lossy:
            return replace(row, hit_tokens=int(self._hit_tokens[places]))
        tiers = tuple(
            replace(view, curve=view.of(self._lossy), hit_tokens=self._held(view.tier, places))
            for view in row.tiers
        )
        return replace(row, hit_tokens=int(self._hit_tokens[places]), tiers=tiers)

    def _held(self, tier: Tier, place: int) -> int:
        tiers = self._tiers
        if tiers is None or tier not in tiers.order:
            return 0
        return int(tiers.tokens[tiers.order.index(tier), self._first + place])

    def __iter__(self) -> Iterator[ReplicaView]:
        return (self[at] for at in range(len(self)))

    def __repr__(self) -> str:
        return f"Pool({list(self)})"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a plan is made from. `links` holds the warmed (prefill, decode) pairs only.

    `columns` are the same once more for pricing all plans at once, if whoever makes the snapshot
    keeps them. `blind`: the catalogue did not answer, so that hits of 0 mean nothing. `peers` are
    the addresses of replicas that lend blocks of their host tiers, by name; `room_tokens` is how
    much of one prompt each of these takes in from elsewhere. `block_tokens` is 0 where nobody says.
    """

    prefill: Sequence[ReplicaView]
    decode: Sequence[ReplicaView]
    links: Mapping[tuple[str, str], LinkCurve]
    kv_bytes_per_token: int
    columns: Columns | None = None
    blind: bool = False
    peers: Mapping[str, str] = field(default_factory=dict)
    room_tokens: Mapping[str, int] = field(default_factory=dict)
    block_tokens: int = 0

    def without(self, names: Collection[str]) -> "Snapshot":
        """The same view less some replicas; the decode replicas stay if no other is there."""
        if not names:
            return self
        prefill = tuple(view for view in self.prefill if view.name not in names)
        decode = tuple(view for view in self.decode if view.name not in names)
        return replace(self, prefill=prefill, decode=decode or tuple(self.decode), columns=None)
