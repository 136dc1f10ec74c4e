from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from kv.block import pack_tokens
from kv.plan import Plan, Reason, Shape, Source, Span
from router.audit import Audit, Record
from router.context import RequestContext, ServiceClass
from router.metrics import RequestMetrics
from router.request import Request
from workers.messages import Delta, Sources

PLAN = Plan(
    Shape.LOCAL,
    Reason.ONLY_REPLICA,
    None,
    "decode-0",
    (Span(Source.COMPUTE, 0, 4, "decode-0"),),
    predicted_ttft_s=2.0,
    cost_s=2.0,
    rivals=(),
)


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class NotingObserver:
    """Notes every call."""

    calls: list[tuple[str, float]] = field(default_factory=list)

    def refused(self, service_class: str, why: str) -> None:
        self.calls.append((f"refused {why}", 0.0))

    def planned(self, record: Record, decision_s: float) -> None:
        self.calls.append((f"planned {record.plan.reason}", decision_s))

    def token(self, record: Record, gap_s: float) -> None:
        self.calls.append(("token", gap_s))

    def finished(self, record: Record) -> None:
        assert record.ended_at is not None
        self.calls.append((f"finished {record.outcome}", record.ended_at))


def request(name: str = "r1", service_class: ServiceClass = ServiceClass.BATCH) -> Request:
    context = RequestContext(name, service_class=service_class)
    return Request(name, pack_tokens([1, 2, 3, 4]), b"", None, context)


def test_an_observer_hears_of_plans_gaps_and_the_end() -> None:
    """The first token is no gap, an empty delta is no token, and each plan is told."""
    clock, observer = Clock(), NotingObserver()
    audit = Audit(clock, observer)
    clock.now_s = 100.5
    record = audit.open(request(), PLAN, started_at=100.0)
    audit.plan(record, PLAN.because(Reason.DECODE_LOST), 0.25)
    for now_s, token_ids in ((102.0, [1]), (102.5, []), (103.0, [2, 3])):
        clock.now_s = now_s
        audit.delta(record, Delta("r1", token_ids))
    record.outcome = "stop"
    clock.now_s = 104.0
    audit.close(record)
    assert observer.calls == [
        ("planned only_replica", 0.5),
        ("planned decode_lost", 0.25),
        ("token", 1.0),
        ("finished stop", 104.0),
    ]
    assert record.ttft_s == 2.0
    assert record.generated_tokens == 3
    assert record.service_class == "batch"
    assert record.plan.reason is Reason.DECODE_LOST


def test_a_record_that_nobody_ended_was_aborted() -> None:
    """A client that leaves gives no outcome; without a token there is no TTFT."""
    audit = Audit(Clock(), NotingObserver())
    record = audit.open(request(), PLAN, 100.0)
    audit.close(record)
    assert (record.outcome, record.ttft_s) == ("aborted", None)


def test_cached_tokens_are_those_that_no_engine_computed() -> None:
    """P's and D's computing both count, and a recomputation never makes it negative."""
    record = Audit(Clock(), NotingObserver()).open(request(), PLAN, 100.0)
    assert record.cached_tokens() == 4
    record.prefill_sources = Sources(4, 1, 3, 0)
    assert record.cached_tokens() == 3
    record.decode_sources = Sources(4, 4, 0, 0)
    assert record.cached_tokens() == 0


def test_a_record_tells_where_each_replica_s_tokens_came_from() -> None:
    """P's tiers and D's handoff; what was not computed is cached, wherever it came from."""
    record = Audit(Clock(), NotingObserver()).open(request(), PLAN, 100.0)
    assert record.sources() == {}
    record.prefill_sources = Sources(4, 1, 0, 0, host_tokens=2, disk_tokens=1)
    record.decode_sources = Sources(4, 0, 1, 3)
    assert record.sources() == {
        "prefill": {"computed": 1, "host": 2, "disk": 1},
        "decode": {"device": 1, "received": 3},
    }
    assert record.cached_tokens() == 3


def test_only_the_last_records_are_kept() -> None:
    """The audit's memory is bounded."""
    audit = Audit(Clock(), NotingObserver(), kept=3)
    for number in range(10):
        audit.open(request(f"r{number}"), PLAN, 100.0)
    assert [record.request_id for record in audit.records] == ["r7", "r8", "r9"]


def finished(
    registry: CollectorRegistry,
    metrics: RequestMetrics,
    name: str,
    plans: int = 1,
    service_class: ServiceClass = ServiceClass.INTERACTIVE,
) -> None:
    """One request with a TTFT of 3 s where 2 s were predicted."""
    clock = Clock()
    audit = Audit(clock, metrics)
    record = audit.open(request(name, service_class), PLAN, 100.0)
    for _ in range(plans - 1):
        audit.plan(record, PLAN.because(Reason.PREFILL_LOST), 0.001)
    for now_s in (103.0, 103.1):
        clock.now_s = now_s
        audit.delta(record, Delta(name, [1]))
    record.outcome = "length"
    audit.close(record)


def test_requests_are_counted_under_the_names_of_the_design() -> None:
    """TTFT, ITL, plans, outcomes and the ratio of actual to predicted."""
    registry = CollectorRegistry()
    finished(registry, RequestMetrics(registry), "r1")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"breakeven_{name}", labels)

    of_class = {"class": "interactive"}
    assert value("request_ttft_seconds_sum", plan="local", **of_class) == pytest.approx(3.0)
    assert value("request_itl_seconds_sum", **of_class) == pytest.approx(0.1)
    assert value("plan_total", plan="local", reason="only_replica") == 1
    assert value("requests_total", outcome="length", **of_class) == 1
    assert value("plan_error_ratio_sum", plan="local") == pytest.approx(1.5)
    assert value("router_decision_seconds_count") == 1


def test_a_batch_request_says_nothing_of_the_prediction() -> None:
    """It waits for others, which no curve predicts; it is counted under its class."""
    registry = CollectorRegistry()
    finished(registry, RequestMetrics(registry), "r1", service_class=ServiceClass.BATCH)
    ratios = "breakeven_plan_error_ratio_count"
    assert registry.get_sample_value(ratios, {"plan": "local"}) is None
    labels = {"class": "batch", "plan": "local"}
    assert registry.get_sample_value("breakeven_request_ttft_seconds_count", labels) == 1


def test_a_request_that_was_planned_anew_says_nothing_of_the_prediction() -> None:
    """Its TTFT holds a failure that no curve predicts."""
    registry = CollectorRegistry()
    finished(registry, RequestMetrics(registry), "r1", plans=2)
    assert registry.get_sample_value("breakeven_plan_error_ratio_count", {"plan": "local"}) is None


def test_labels_do_not_grow_with_requests() -> None:
    """However many requests, tenants and ids, the set of time series stays as it is."""
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)
    finished(registry, metrics, "r0")
    series = {(s.name, *s.labels.items()) for m in registry.collect() for s in m.samples}
    for number in range(1, 20):
        finished(registry, metrics, f"r{number}")
    after = {(s.name, *s.labels.items()) for m in registry.collect() for s in m.samples}
    assert after == series
    assert {label for _, *labels in after for label, _ in labels} == {
        "class", "plan", "reason", "outcome", "le",
    }  # fmt: skip
