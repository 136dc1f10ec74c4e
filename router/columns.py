"""A snapshot as columns of numbers.

Pricing 1,024 pairs one by one in Python takes milliseconds, pricing columns 20 us. Rows are of
replicas, decode replicas first, each pool by name. No array is ever changed in place.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kv.catalogue import Tier
from kv.curve import LinkCurve

if TYPE_CHECKING:
    from router.snapshot import ReplicaView, TierView

Floats = NDArray[np.float64]

# The rows of `Columns.loads`.
BASE_S, PER_TOKEN_S, PER_TOKEN2_S, QUEUE_S, WAITING_S, ENTRY_S, OWN_S, RUNNING = range(8)
UNNAMED, YIELDING, PEER_LATENCY_S, PEER_PER_BYTE_S = range(8, 12)
_ROWS = 12

# The order in which an engine asks the tiers behind its paged KV.
TIER_ORDER = tuple(tier for tier in Tier if tier is not Tier.DEVICE)
TIER_AT: dict[Tier, int] = {tier: at for at, tier in enumerate(TIER_ORDER)}


class LinkColumns(NamedTuple):
    """The cost of each pair, float64 of shape (decode replicas, prefill replicas).

    The latency is infinite where a pair is not warmed.
    """

    latency_s: Floats
    per_byte_s: Floats

    @classmethod
    def of(
        cls,
        decode: Sequence[str],
        prefill: Sequence[str],
        curves: Mapping[tuple[str, str], LinkCurve],
    ) -> "LinkColumns":
        """The links between replicas of these names."""
        shape = (len(decode), len(prefill))
        links = cls(np.full(shape, np.inf), np.zeros(shape))
        rows = {name: row for row, name in enumerate(decode)}
        places = {name: place for place, name in enumerate(prefill)}
        for (p, d), curve in curves.items():
            if p in places and d in rows:
                at = rows[d], places[p]
                links.latency_s[at], links.per_byte_s[at] = curve.latency_s, curve.per_byte_s
        return links


# A replica's place, one of its tiers, the leading tokens that this holds, what fetching costs.
Found = tuple[int, Tier, int, LinkCurve]


class TierColumns(NamedTuple):
    """What tiers hold of a prompt, float64 of shape (tiers, replicas).

    `tokens` counts the leading ones that a tier holds. Fetching n bytes from there into the paged
    KV takes `latency_s + n * per_byte_s`; the latency is infinite where a tier holds nothing.
    """

    order: tuple[Tier, ...]
    tokens: Floats
    latency_s: Floats
    per_byte_s: Floats

    @classmethod
    def of(cls, found: Sequence[Found], replicas: int) -> "TierColumns | None":
        """What these tiers, of so many replicas, hold; None if that is nothing."""
        there = {tier for _, tier, tokens, _ in found if tokens}
        if not there:
            return None
        order = tuple(tier for tier in TIER_ORDER if tier in there)
        shape = (len(order), replicas)
        columns = cls(order, np.zeros(shape), np.full(shape, np.inf), np.zeros(shape))
        for place, tier, tokens, curve in found:
            if tokens:
                at = order.index(tier), place
                columns.tokens[at] = tokens
                columns.latency_s[at], columns.per_byte_s[at] = curve.latency_s, curve.per_byte_s
        return columns


class TierCosts:
    """What fetching from each tier costs each replica, whatever the prompt; kept from one request
    to the next, since looking through all replicas takes longer than pricing them."""

    def __init__(self, replicas: int) -> None:
        # Of exact blocks and of lossy ones; the latency is infinite where there is no such tier.
        shape = (2, len(TIER_ORDER), replicas)
        self._latency_s, self._per_byte_s = np.full(shape, np.inf), np.zeros(shape)

    def set(self, place: int, tiers: Iterable["TierView"]) -> None:
        """The tiers of the replica at this place."""
        self._latency_s[:, :, place] = np.inf
        for view in tiers:
            at = TIER_AT[view.tier]
            for lossy in (False, True):
                curve = view.of(lossy)
                self._latency_s[int(lossy), at, place] = curve.latency_s
                self._per_byte_s[int(lossy), at, place] = curve.per_byte_s

    def holding(self, tokens: Floats, lossy: bool) -> TierColumns | None:
        """Where tiers hold so many leading tokens, (tiers, replicas) in `TIER_ORDER`; what a
        replica has no tier for counts for nothing. None where nothing is held."""
        latency_s, per_byte_s = self._latency_s[int(lossy)], self._per_byte_s[int(lossy)]
        held = np.where(np.isfinite(latency_s), tokens, 0.0)
        there: NDArray[np.bool_] = np.any(held, axis=1)
        if not there.any():
            return None
        order = tuple(tier for tier, at in TIER_AT.items() if there[at])
        held = held[there]
        none = held == 0.0
        latency_s, per_byte_s = latency_s[there], per_byte_s[there]
        latency_s[none], per_byte_s[none] = np.inf, 0.0
        return TierColumns(order, held, latency_s, per_byte_s)


class Lending(NamedTuple):
    """By replica: whether it lends blocks of its host tier, and how many tokens of one prompt it
    takes in from elsewhere."""

    lends: NDArray[np.bool_]
    room_tokens: Floats

    @classmethod
    def of(
        cls, names: Sequence[str], peers: Mapping[str, str], room_tokens: Mapping[str, int]
    ) -> "Lending":
        """Of replicas of these names; `peers` are those that lend."""
        lends = np.array([name in peers for name in names], np.bool_)
        room = [room_tokens.get(name, 0) if name in peers else 0 for name in names]
        return cls(lends, np.array(room, np.float64))


class Displaced(NamedTuple):
    """What new blocks push out of each replica's paged KV, float64 a replica.

    There is room for `free_tokens`; each token beyond costs `per_token_s`: the chance that what is
    pushed out is asked for again, times the seconds a token that bring it back.
    """

    free_tokens: Floats
    per_token_s: Floats

    @classmethod
    def of(
        cls,
        rows: Sequence["ReplicaView"],
        free_tokens: Sequence[int],
        chance: float,
        token_bytes: int,
    ) -> "Displaced | None":
        """Of these rows, which have so much room; None where nothing is asked for again."""
        if not chance:
            return None
        back_s = [
            min([row.curve.per_token_s, *(t.curve.per_byte_s * token_bytes for t in row.tiers)])
            for row in rows
        ]
        return cls(np.array(free_tokens, np.float64), chance * np.array(back_s, np.float64))

    def seconds(self, new_tokens: Floats) -> Floats:
        """By replica, if so many tokens come to each."""
        pushed: Floats = np.maximum(new_tokens - self.free_tokens, 0.0) * self.per_token_s
        return pushed


class Columns(NamedTuple):
    """Replicas by name, decode replicas first; `loads` is float64 of shape (12, replicas).

    Its rows are the prefill curve's three coefficients; seconds until what is queued is computed;
    seconds until those that wait run; what a handoff to it costs beside its link; what a local
    prefill costs beside its compute; how many streams run; whose blocks there may be that nobody
    was told of (`router.snapshot.Unnamed`); how many requests it has that give way; and the two
    coefficients of what blocks cost it that another replica lends. `hit_tokens` is float64 a
    replica. `tiers` is None where none holds more than the paged KV does, `displaced` where nothing
    is known to be missed once it is pushed out, `lending` where whoever made these left it to be
    found out.
    """

    names: tuple[str, ...]
    n_decode: int
    loads: Floats
    links: LinkColumns
    hit_tokens: Floats
    tiers: TierColumns | None = None
    displaced: Displaced | None = None
    lending: Lending | None = None

    @classmethod
    def of(
        cls,
        decode: Sequence["ReplicaView"],
        prefill: Sequence["ReplicaView"],
        curves: Mapping[tuple[str, str], LinkCurve],
    ) -> "Columns":
        """Columns of these rows, each pool sorted by name."""
        rows = [*sorted(decode, key=_name), *sorted(prefill, key=_name)]
        names = tuple(row.name for row in rows)
        return cls(
            names,
            len(decode),
            loads_of(rows),
            LinkColumns.of(names[: len(decode)], names[len(decode) :], curves),
            np.array([float(row.hit_tokens) for row in rows]),
            TierColumns.of(
                [
                    (place, view.tier, view.hit_tokens, view.curve)
                    for place, row in enumerate(rows)
                    for view in row.tiers
                ],
                len(rows),
            ),
        )


def loads_of(rows: Sequence["ReplicaView"]) -> Floats:
    """The columns of these rows, whatever their hits."""
    return np.array([load_of(row) for row in rows], dtype=np.float64).reshape(-1, _ROWS).T.copy()


def load_of(row: "ReplicaView") -> tuple[float, ...]:
    """One replica's column."""
    curve, queue_s, crowding_s = row.curve, row.queue_s, row.crowding_s
    waiting_s = row.waiting * row.step_s
    costs = (waiting_s, waiting_s + crowding_s, queue_s + crowding_s)
    return (
        curve.base_s,
        curve.per_token_s,
        curve.per_token2_s,
        queue_s,
        *costs,
        float(row.running),
        float(row.unnamed),
        float(row.yielding),
        row.peer.latency_s,
        row.peer.per_byte_s,
    )


def _name(row: "ReplicaView") -> str:
    return row.name
