"""What an engine has done since it started, and what its connectors tell of fetching from tiers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import SchedulerStats

from kv.block import KEY_BYTES
from kv.catalogue import Tier
from kv.live import RETRY_S
from workers.fetches import Fetches
from workers.messages import Delta, Sources, Totals
from workers.mirror import Change
from workers.tiers import TIERED_CONNECTOR, VAULT_STORED_BYTES

# vLLM's words for where KV came from and what was moved, and ours.
SOURCES = {
    CacheHitSource.HOST: "host_tokens",
    CacheHitSource.DISK: "disk_tokens",
    CacheHitSource.P2P: "peer_tokens",
    # vLLM has no word for a vault, and no other tier of ours is without one.
    CacheHitSource.EXTERNAL_UNSPECIFIED: "vault_tokens",
}
FAILED = "vllm:kv_offload_tiering_promotion_job_failures"
TIER_METRICS = {
    "vllm:kv_offload_store_bytes": "host_stored_bytes",
    "vllm:kv_offload_load_bytes": "host_loaded_bytes",
    FAILED: "failed_loads",
    VAULT_STORED_BYTES: "vault_stored_bytes",
}
# Those that are labelled by tier.
METRICS_BY_TIER = {
    "vllm:kv_offload_tiering_write_bytes": {Tier.DISK: "disk_stored_bytes"},
    "vllm:kv_offload_tiering_read_bytes": {
        Tier.DISK: "disk_loaded_bytes",
        Tier.PEER: "peer_loaded_bytes",
        Tier.VAULT: "vault_loaded_bytes",
    },
}
# Bytes and seconds of what came from a tier: of all that went to the device, and of what each
# tier behind the host tier gave to it.
LOADED = ("vllm:kv_offload_load_bytes", "vllm:kv_offload_load_time")
PROMOTED = ("vllm:kv_offload_tiering_read_bytes", "vllm:kv_offload_tiering_read_time")
# The tiers behind the host tier by the end of their label, which is their type.
_BY_LABEL = {
    "DiskTier": Tier.DISK,
    "fs": Tier.DISK,  # vLLM's own, which benchmarks put in its place
    "PeerTier": Tier.PEER,
    "VaultTier": Tier.VAULT,
}


def with_tiers(sources: Sources, loaded: Mapping[CacheHitSource, int] | None) -> Sources:
    """The same, with what was `loaded` from tiers told apart from what a handoff brought."""
    if not loaded:
        return sources
    counted: dict[str, int] = {}
    for source, tokens in loaded.items():
        name = SOURCES.get(source, "received_tokens")
        counted[name] = counted.get(name, 0) + tokens
    counted.setdefault("received_tokens", 0)
    return msgspec.structs.replace(sources, **counted)


def without_connectors(stats: SchedulerStats | None) -> SchedulerStats | None:
    """For vLLM's own metrics, which know no words of our tiers; ours count those."""
    if stats is None or stats.kv_connector_stats is None:
        return stats
    return replace(stats, kv_connector_stats=None)


class Counters:
    """Totals, and what `fetches` from the tiers of an engine of so many `ranks` took; `retry_s` is
    `kv.live`'s."""

    def __init__(
        self,
        tiers: tuple[Tier, ...],
        now: Callable[[], float],
        retry_s: float | None = RETRY_S,
        ranks: int = 1,
    ) -> None:
        self._counts: dict[str, float] = {}
        self._ranks = ranks
        self._tiered = bool(tiers)
        self.fetches = Fetches(tiers, now, retry_s)

    def _add(self, name: str, amount: float) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount

    def count(self, deltas: list[Delta]) -> None:
        """What a step gave to requests."""
        for delta in deltas:
            self._add("generated_tokens", len(delta.token_ids))
            if delta.sources is not None:
                for source, tokens in delta.sources.by_source().items():
                    self._add(f"prompt_tokens_{source}", tokens)

    def evicted(self, changes: Iterable[Change]) -> None:
        """Blocks that went from the paged KV."""
        gone = sum(len(each.removed) for each in changes if each.tier is Tier.DEVICE)
        self._add("evicted_blocks", gone // KEY_BYTES)

    def observe(self, stats: SchedulerStats | None) -> None:
        """What the connectors did in this step."""
        if stats is None:
            return
        seen = stats.kv_connector_stats or {}
        if not self._tiered:
            self._observe_handoffs(seen)
            return
        for connector, each in seen.items():
            if connector == TIERED_CONNECTOR:
                self._observe_tiers(each.get("data", {}))
            else:
                self._observe_handoffs(each)

    def _observe_tiers(self, seen: dict[str, dict[tuple[str, ...], float]]) -> None:
        """vLLM's offloading metrics of this step, by name and labels."""
        for name, total in TIER_METRICS.items():
            self._add(total, sum(seen.get(name, {}).values()))
        loaded_bytes, loaded_s = (sum(seen.get(name, {}).values()) for name in LOADED)
        self.fetches.copied(Tier.HOST, False, int(loaded_bytes), loaded_s)
        for name, totals in METRICS_BY_TIER.items():
            for label, amount in seen.get(name, {}).items():
                if (tier := _tier(label)) in totals:
                    self._add(totals[tier], amount)
        self._observe_promotions(seen)

    def _observe_promotions(self, seen: dict[str, dict[tuple[str, ...], float]]) -> None:
        promoted_bytes, promoted_s = (seen.get(name, {}) for name in PROMOTED)
        for label, n_bytes in promoted_bytes.items():
            # These are sums over jobs, up to when a step noticed them: a vault and peers tell of
            # each of their loads themselves.
            if _tier(label) is Tier.DISK and Tier.DISK in self.fetches:
                seconds = promoted_s.get(label, 0.0)
                self.fetches.copied(Tier.DISK, False, int(n_bytes), seconds)

    def _observe_handoffs(self, seen: dict[str, Any]) -> None:
        """NIXL's telemetry (lists, one entry a transfer)."""
        self._add("transfers", len(seen.get("bytes_transferred", ())))
        self._add("transfer_bytes", sum(seen.get("bytes_transferred", ())))
        self._add("transfer_s", sum(seen.get("transfer_duration", ())))
        # Each rank tells of its part of one read, or lease: what all of them tell is one.
        for name in ("num_failed_transfers", "num_failed_handshakes"):
            self._add("failed_transfers", -(-sum(seen.get(name, ())) // self._ranks))
        expired = sum(seen.get("num_kv_expired_reqs", ()))
        self._add("expired_leases", -(-expired // self._ranks))

    def frozen(self) -> Totals:
        kinds = Totals.__annotations__
        return Totals(**{k: kinds[k](v) for k, v in self._counts.items()})


def _tier(label: tuple[str, ...]) -> Tier | None:
    return _BY_LABEL.get(label[0].rpartition(":")[2])
