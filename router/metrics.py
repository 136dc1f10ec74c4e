"""Breakeven's metrics. Names and labels are DESIGN.md's; base units throughout."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kv.catalogue import Tier
from router.audit import Record
from router.context import ServiceClass
from router.fleet import Fleet
from router.member import Member, tier_bytes
from router.orders import Order
from router.policy import Policy
from router.retired import Counts
from router.shadow import Outcome, Shadow

logger = logging.getLogger(__name__)

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
_ITL_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_DECISION_S = (25e-6, 50e-6, 1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 5e-3)
# How blocks of tiers travel.
TRANSPORTS = (("host", "local"), ("disk", "local"), ("peer", "nixl"), ("vault", "nixl"))
_RATIO = (0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4)


class RequestMetrics:
    """Counts finished requests: the audit's observer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ttft = Histogram(
            "breakeven_request_ttft_seconds",
            "Until the first token",
            ["class", "plan"],
            buckets=_TTFT_S,
            registry=registry,
        )
        self._itl = Histogram(
            "breakeven_request_itl_seconds",
            "Between tokens",
            ["class"],
            buckets=_ITL_S,
            registry=registry,
        )
        self._plans = Counter("breakeven_plan", "Plans made", ["plan", "reason"], registry=registry)
        self._ratio = Histogram(
            "breakeven_plan_error_ratio",
            "Actual over predicted TTFT",
            ["plan"],
            buckets=_RATIO,
            registry=registry,
        )
        self._decision = Histogram(
            "breakeven_router_decision_seconds",
            "Naming blocks, looking up and planning",
            buckets=_DECISION_S,
            registry=registry,
        )
        self._requests = Counter(
            "breakeven_requests",
            "Requests by how they ended",
            ["class", "outcome"],
            registry=registry,
        )

    def refused(self, service_class: str, why: str) -> None:
        self._requests.labels(service_class, "refused").inc()

    def planned(self, record: Record, decision_s: float) -> None:
        self._plans.labels(record.plan.shape, record.plan.reason).inc()
        self._decision.observe(decision_s)

    def token(self, record: Record, gap_s: float) -> None:
        self._itl.labels(record.service_class).observe(gap_s)

    def finished(self, record: Record) -> None:
        logger.info("request", extra={"fields": _fields(record)})
        self._requests.labels(record.service_class, record.outcome).inc()
        ttft_s = record.ttft_s
        if ttft_s is None:
            return
        self._ttft.labels(record.service_class, record.plan.shape).observe(ttft_s)
        # Nobody can say how long a batch request gives way to others.
        urgent = record.service_class != ServiceClass.BATCH
        if urgent and len(record.plans) == 1 and record.plan.predicted_ttft_s > 0:
            ratio = ttft_s / record.plan.predicted_ttft_s
            self._ratio.labels(record.plan.shape).observe(ratio)


def _fields(record: Record) -> dict[str, Any]:
    """A finished request for the log."""
    return {
        "request_id": record.request_id,
        "class": record.service_class,
        "plan": record.plan.header(),
        "plans": len(record.plans),
        "outcome": record.outcome,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens(),
        "sources": record.sources(),
        "generated_tokens": record.generated_tokens,
        "ttft_s": record.ttft_s,
    }


class FleetMetrics(Collector):
    """The whole cluster's sums, as its replicas last reported them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        members = self._fleet.members()
        up = GaugeMetricFamily(
            "breakeven_replica_up", "1 while a replica answers", labels=["role", "replica"]
        )
        leases = GaugeMetricFamily("breakeven_leases", "Prefills whose blocks wait to be read")
        held = GaugeMetricFamily("breakeven_tier_bytes", "KV that is cached", labels=["tier"])
        for member in members:
            up.add_metric([member.replica.role, member.name], float(member.up))
        held.add_metric(["device"], sum(map(self._cached_bytes, members)))
        for tier in sorted({tier for member in members for tier in member.load.tiers}):
            held.add_metric([tier], sum(tier_bytes(member, tier) for member in members))
        leases.add_metric([], sum(member.load.leased for member in members))
        yield up
        yield leases
        yield held
        yield from self._catalogue()
        yield self._tokens()
        yield self._evictions()
        yield from self._transfers()

    def _catalogue(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "breakeven_catalogue_up", "1 while the catalogue answers", float(self._fleet.line.up)
        )
        yield GaugeMetricFamily(
            "breakeven_catalogue_lag_seconds",
            "Age of the oldest change of blocks when it was taken in, of the last 15 s or more",
            self._fleet.line.beat.lag_s,
        )
        yield GaugeMetricFamily(
            "breakeven_eviction_regret_ratio",
            "How likely a block that leaves paged KV now will be asked for again",
            self._fleet.line.beat.regret,
        )

    def _cached_bytes(self, member: Member) -> int:
        replica = member.replica
        block_bytes = replica.block_tokens * replica.kv_bytes_per_token
        return self._fleet.cached_blocks(member) * block_bytes

    def _counted(self) -> list[Counts]:
        """Totals of every engine there ever was: sums of counters must not fall."""
        loads = (member.load for member in self._fleet.members())
        now = [Counts(load.lanes, load.totals) for load in loads]
        return [*self._fleet.retired(), *now]

    def _tokens(self) -> Metric:
        tokens = CounterMetricFamily(
            "breakeven_prompt_tokens", "Prompt tokens by source", labels=["source"]
        )
        totals = [totals for _, totals in self._counted()]
        # What a handoff brought was counted where its prefill replica had it from.
        for source in (*Tier, "computed"):
            name = f"prompt_tokens_{source}"
            tokens.add_metric([source], sum(getattr(each, name) for each in totals))
        return tokens

    def _evictions(self) -> Metric:
        gone = sum(totals.evicted_blocks for _, totals in self._counted())
        return CounterMetricFamily("breakeven_evicted_blocks", "Given up by paged KV", gone)

    def _transfers(self) -> Iterator[Metric]:
        labels = ["source_tier", "transport"]
        moved = CounterMetricFamily("breakeven_transfer_bytes", "Bytes of KV read", labels=labels)
        spent = CounterMetricFamily("breakeven_transfer_seconds", "Spent reading", labels=labels)
        failed = CounterMetricFamily("breakeven_failed_transfers", "Reads of KV that failed")
        by_lane: dict[str, tuple[float, float]] = {}
        for lanes, totals in self._counted():
            if totals.transfers:
                lane = ",".join(lanes) or "unknown"
                n_bytes, seconds = by_lane.get(lane, (0.0, 0.0))
                by_lane[lane] = (n_bytes + totals.transfer_bytes, seconds + totals.transfer_s)
        for lane, (n_bytes, seconds) in by_lane.items():
            moved.add_metric(["device", lane], n_bytes)
            spent.add_metric(["device", lane], seconds)
        every = [totals for _, totals in self._counted()]
        for tier, transport in TRANSPORTS:
            n_bytes = sum(getattr(each, f"{tier}_loaded_bytes") for each in every)
            if n_bytes:
                moved.add_metric([tier, transport], n_bytes)
        failed.add_metric([], sum(each.failed_transfers + each.failed_loads for each in every))
        yield moved
        yield spent
        yield failed


class PolicyMetrics(Collector):
    """Which policy is in force, and how its shadows compare."""

    def __init__(self, order: Callable[[], Order], shadow: Shadow) -> None:
        self._order, self._shadow = order, shadow

    def collect(self) -> Iterator[Metric]:
        in_force = GaugeMetricFamily(
            "breakeven_policy", "1 for the policy in force", labels=["policy"]
        )
        for policy in Policy:
            in_force.add_metric([policy], float(policy is self._order().policy))
        yield in_force
        yield from self._shadows()

    def _shadows(self) -> Iterator[Metric]:
        plans = CounterMetricFamily(
            "breakeven_shadow", "Plans of shadow policies", labels=["policy", "outcome"]
        )
        predicted = CounterMetricFamily(
            "breakeven_shadow_predicted_ttft_seconds",
            "Predicted for the plans that were compared, by whose plan it is",
            labels=["policy", "plan"],
        )
        for policy in Policy:
            tallies = [t for (_, shadow), t in self._shadow.tallies.items() if shadow is policy]
            if tallies:
                for outcome in Outcome:
                    plans.add_metric([policy, outcome], sum(t.outcomes[outcome] for t in tallies))
                predicted.add_metric([policy, "live"], sum(t.live_ttft_s for t in tallies))
                predicted.add_metric([policy, "shadow"], sum(t.shadow_ttft_s for t in tallies))
        yield plans
        yield predicted
