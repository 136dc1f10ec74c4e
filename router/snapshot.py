"""An immutable view of the cluster, made for one request."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from kv.curve import LinkCurve, PrefillCurve


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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a plan is made from. `links` holds the warmed (prefill, decode) pairs only.

    `blind`: the catalogue did not answer, so that hits of 0 mean nothing.
    """

    prefill: tuple[ReplicaView, ...]
    decode: tuple[ReplicaView, ...]
    links: Mapping[tuple[str, str], LinkCurve]
    kv_bytes_per_token: int
    blind: bool = False

    def without(self, names: Collection[str]) -> "Snapshot":
        """The same view less some replicas; the decode replicas stay if no other is there."""
        prefill = tuple(view for view in self.prefill if view.name not in names)
        decode = tuple(view for view in self.decode if view.name not in names)
        return replace(self, prefill=prefill, decode=decode or self.decode)
