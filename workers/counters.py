"""What an engine has done since it started, and what fetching from its tiers costs it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import SchedulerStats

from kv.block import KEY_BYTES
from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.fetch import GUESSES, FetchCost
from kv.live import RETRY_S
from workers.messages import Delta, LossyLoad, Sources, Spent, TierLoad, Totals
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
TIER_METRICS = {
    "vllm:kv_offload_store_bytes": "host_stored_bytes",
    "vllm:kv_offload_load_bytes": "host_loaded_bytes",
    "vllm:kv_offload_tiering_promotion_job_failures": "failed_loads",
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
    """Totals, and the curves of an engine's tiers; `retry_s` is `kv.live`'s."""

    def __init__(
        self, tiers: tuple[Tier, ...], now: Callable[[], float], retry_s: float | None = RETRY_S
    ) -> None:
        self._counts: dict[str, float] = {}
        self._now = now
        self._costs = {tier: FetchCost(GUESSES[tier], retry_s) for tier in tiers}
        # Of blocks that a lossy codec made smaller, from when the first was fetched.
        self._lossy: dict[Tier, FetchCost] = {}
        self._retry_s = retry_s

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

    def fetched(self, sources: Sources, spent: Spent) -> None:
        """What a request waited for a tier, if one alone brought what it lacked."""
        told = (sources.host_tokens, sources.disk_tokens, sources.vault_tokens)
        by_tier = dict(zip((Tier.HOST, Tier.DISK, Tier.VAULT), told, strict=True))
        gave = [tier for tier, tokens in by_tier.items() if tokens]
        others = sources.received_tokens + sources.peer_tokens
        if len(gave) != 1 or others or gave[0] not in self._costs:
            return
        (tier,), now_s, seconds = gave, self._now(), spent.loading_s
        if tier is not Tier.HOST:  # they went through host memory
            seconds -= self._costs[Tier.HOST].curve(now_s).per_byte_s * spent.loaded_bytes
        cost = self._cost(tier, spent.lossy)
        saw = cost.saw_at_most if spent.others_tokens else cost.saw
        saw(spent.loaded_bytes, seconds, now_s)

    def loaded(self, tier: Tier, lossy: bool, n_bytes: int, seconds: float) -> None:
        """What bringing so many bytes into host memory took, whoever waited for them."""
        self._cost(tier, lossy).saw_at_least(n_bytes, seconds, self._now())

    def observe(self, stats: SchedulerStats | None) -> None:
        """What the connectors did in this step."""
        if stats is None:
            return
        seen = stats.kv_connector_stats or {}
        if not self._costs:
            self._observe_handoffs(seen)
            return
        for connector, each in seen.items():
            if connector == TIERED_CONNECTOR:
                self._observe_tiers(each.get("data", {}))
            else:
                self._observe_handoffs(each)

    def curve(self, tier: Tier) -> LinkCurve:
        """Seconds to bring bytes from a tier into the paged KV; through the host tier, if not from
        there."""
        now_s = self._now()
        own, host = self._costs[tier].curve(now_s), self._costs[Tier.HOST].curve(now_s)
        if tier is Tier.HOST:
            return own
        return LinkCurve(own.latency_s, own.per_byte_s + host.per_byte_s)

    def lossy_curve(self, tier: Tier, share: float) -> LinkCurve:
        """The same for pages that a lossy codec stored; it made them smaller to this `share`, by
        which it is guessed what fetching them costs until one was."""
        own, host = self._costs[tier], self._costs[Tier.HOST].curve(self._now())
        if tier in self._lossy:
            found = self._lossy[tier].curve(self._now())
        else:
            raw = own.curve(self._now())
            found = LinkCurve(raw.latency_s, raw.per_byte_s * share)
        return LinkCurve(found.latency_s, found.per_byte_s + host.per_byte_s)

    def fetches(self, tier: Tier, lossy: bool = False) -> int:
        """How many fetches from a tier its curve is made from."""
        costs = self._lossy if lossy else self._costs
        return costs[tier].samples if tier in costs else 0

    def load(
        self, tier: Tier, blocks: int, unnamed: int, lossy_share: float | None = None
    ) -> TierLoad:
        """What is told of a tier that holds so many; `lossy_share` as in `lossy_curve`, None where
        no codec is."""
        curve, lossy = self.curve(tier), None
        if lossy_share is not None:
            own = self.lossy_curve(tier, lossy_share)
            lossy = LossyLoad(own.latency_s, own.per_byte_s, self.fetches(tier, True))
        fetches = self.fetches(tier)
        return TierLoad(blocks, unnamed, curve.latency_s, curve.per_byte_s, fetches, lossy)

    def _cost(self, tier: Tier, lossy: bool) -> FetchCost:
        if not lossy or tier is not Tier.VAULT:
            return self._costs[tier]
        if tier not in self._lossy:
            self._lossy[tier] = FetchCost(GUESSES[tier], self._retry_s)
        return self._lossy[tier]

    def _observe_tiers(self, seen: dict[str, dict[tuple[str, ...], float]]) -> None:
        """vLLM's offloading metrics of this step, by name and labels."""
        for name, total in TIER_METRICS.items():
            self._add(total, sum(seen.get(name, {}).values()))
        loaded_bytes, loaded_s = (sum(seen.get(name, {}).values()) for name in LOADED)
        self._costs[Tier.HOST].saw_at_least(int(loaded_bytes), loaded_s, self._now())
        for name, totals in METRICS_BY_TIER.items():
            for label, amount in seen.get(name, {}).items():
                if (tier := _tier(label)) in totals:
                    self._add(totals[tier], amount)
        promoted_bytes, promoted_s = (seen.get(name, {}) for name in PROMOTED)
        for label, n_bytes in promoted_bytes.items():
            # A vault tells itself which of its loads were of smaller frames.
            if (tier := _tier(label)) in self._costs and tier is not Tier.VAULT:
                seconds = promoted_s.get(label, 0.0)
                self._costs[tier].saw_at_least(int(n_bytes), seconds, self._now())

    def _observe_handoffs(self, seen: dict[str, Any]) -> None:
        """NIXL's telemetry (lists, one entry a transfer)."""
        self._add("transfers", len(seen.get("bytes_transferred", ())))
        self._add("transfer_bytes", sum(seen.get("bytes_transferred", ())))
        self._add("transfer_s", sum(seen.get("transfer_duration", ())))
        for name in ("num_failed_transfers", "num_failed_handshakes"):
            self._add("failed_transfers", sum(seen.get(name, ())))
        self._add("expired_leases", sum(seen.get("num_kv_expired_reqs", ())))

    def frozen(self) -> Totals:
        kinds = Totals.__annotations__
        return Totals(**{k: kinds[k](v) for k, v in self._counts.items()})


def _tier(label: tuple[str, ...]) -> Tier | None:
    return _BY_LABEL.get(label[0].rpartition(":")[2])
