"""A snapshot as columns of numbers.

Pricing 1,024 pairs one by one in Python takes milliseconds, pricing columns 20 us. Rows are of
replicas, decode replicas first, each pool by name. No array is ever changed in place.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kv.catalogue import Tier
from kv.curve import LinkCurve

if TYPE_CHECKING:
    from router.snapshot import ReplicaView

Floats = NDArray[np.float64]

# The rows of `Columns.loads`.
BASE_S, PER_TOKEN_S, PER_TOKEN2_S, QUEUE_S, WAITING_S, ENTRY_S, OWN_S, RUNNING, UNNAMED = range(9)
_ROWS = 9

# The order in which an engine asks the tiers behind its paged KV.
TIER_ORDER = tuple(tier for tier in Tier if tier is not Tier.DEVICE)


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
    def of(cls, rows: Mapping[int, "ReplicaView"], replicas: int) -> "TierColumns | None":
        """The tiers of the replicas at these places, of so many; None if they hold nothing of the
        prompt."""
        found = [
            (view, place) for place, row in rows.items() for view in row.tiers if view.hit_tokens
        ]
        order = tuple(tier for tier in TIER_ORDER if any(view.tier is tier for view, _ in found))
        if not order:
            return None
        shape = (len(order), replicas)
        columns = cls(order, np.zeros(shape), np.full(shape, np.inf), np.zeros(shape))
        for view, place in found:
            at = order.index(view.tier), place
            columns.tokens[at] = view.hit_tokens
            columns.latency_s[at] = view.curve.latency_s
            columns.per_byte_s[at] = view.curve.per_byte_s
        return columns


class Columns(NamedTuple):
    """Replicas by name, decode replicas first; `loads` is float64 of shape (9, replicas).

    Its rows are the prefill curve's three coefficients; seconds until what is queued is computed;
    seconds until those that wait run; what a handoff to it costs beside its link; what a local
    prefill costs beside its compute; how many streams run; and 1 where tiers hold what nobody was
    told of. `hit_tokens` is float64 a replica. `tiers` is None where none holds more than the paged
    KV does.
    """

    names: tuple[str, ...]
    n_decode: int
    loads: Floats
    links: LinkColumns
    hit_tokens: Floats
    tiers: TierColumns | None = None

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
            TierColumns.of(dict(enumerate(rows)), len(rows)),
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
    )


def _name(row: "ReplicaView") -> str:
    return row.name
