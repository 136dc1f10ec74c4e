"""A shadow is compared, counted, and harms nothing."""

import asyncio
import logging
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from kv.catalogue import Tier
from kv.codecs.codec import CodecName
from kv.plan import Plan, Reason, Shape, Source, Span
from router.audit import Record
from router.metrics import PolicyMetrics
from router.orders import Order
from router.policy import Policy
from router.policy.question import Question
from router.shadow import Choice, Outcome, Shadow
from router.snapshot import Snapshot

QUESTION = Question(4, Snapshot((), (), {}, 1), 0.5)
LIVE, SHADOW = Policy.BREAKEVEN, Policy.LEAST_LOADED


def plan(prefill: str | None, decode: str, predicted_ttft_s: float) -> Plan:
    shape = Shape.REMOTE if prefill else Shape.LOCAL
    spans = (Span(Source.COMPUTE, 0, 4, prefill or decode),)
    reason = Reason.ONLY_REPLICA
    return Plan(shape, reason, prefill, decode, spans, predicted_ttft_s, predicted_ttft_s, ())


ANSWERED = plan("prefill-0", "decode-0", 2.0)
CHOICE = Choice(QUESTION, Order(LIVE, SHADOW), ANSWERED)


async def shadowed(shadow: Shadow, choice: Choice = CHOICE) -> Record:
    record = Record("r1", "batch", 4, 0.0, [choice.plan])
    shadow.follow(choice, record)
    assert record.shadow is None, "the request waited for it"
    await asyncio.sleep(0)
    return record


def answering(made: Plan) -> Shadow:
    return Shadow({SHADOW: lambda _: made})


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        (plan("prefill-0", "decode-0", 9.0).because(Reason.LEAST_LOADED), Outcome.SAME),
        (plan("prefill-1", "decode-0", 1.0), Outcome.REPLICA),
        (plan("prefill-0", "decode-1", 1.0), Outcome.REPLICA),
        (plan(None, "decode-0", 1.0), Outcome.SHAPE),
    ],
)
async def test_a_shadow_is_told_apart_by_replicas_and_shape(made: Plan, outcome: Outcome) -> None:
    """Reasons and predictions make no difference between two plans."""
    record = await shadowed(answering(made))
    assert record.shadow is not None
    assert (record.shadow.outcome, record.shadow.plan) == (outcome, made)


async def test_a_shadow_s_plan_names_the_codec_that_it_would_fetch_by() -> None:
    """As the live one does: equal plans look equal."""
    spans = (Span(Source.FETCH, 0, 4, "decode-0", Tier.VAULT),)
    made = replace(ANSWERED, spans=spans)
    record = await shadowed(answering(made), replace(CHOICE, codec=CodecName.INT8))
    assert record.shadow is not None
    assert record.shadow.plan == made.coded(CodecName.INT8)
    assert record.shadow.plan != made


async def test_a_shadow_that_raises_is_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing of it comes through to the request."""

    def fail(_: Question) -> Plan:
        raise ZeroDivisionError("of a policy on trial")

    shadow = Shadow({SHADOW: fail})
    with caplog.at_level(logging.ERROR):
        records = [await shadowed(shadow) for _ in range(5)]
    assert all(r.shadow is not None and r.shadow.outcome is Outcome.FAILED for r in records)
    assert shadow.tallies[LIVE, SHADOW].outcomes == {Outcome.FAILED: 5}
    assert shadow.tallies[LIVE, SHADOW].mean_difference_s is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("other", [None, LIVE])
async def test_without_another_policy_nothing_is_planned(other: Policy | None) -> None:
    """No shadow, or one that is in force itself."""
    shadow = Shadow({})
    record = await shadowed(shadow, Choice(QUESTION, Order(LIVE, other), ANSWERED))
    assert record.shadow is None
    assert shadow.tallies == {}


async def test_the_next_plan_of_a_request_forgets_the_shadow_of_the_last() -> None:
    """A shadow stands beside the plan that it answers to."""
    shadow = answering(ANSWERED)
    record = await shadowed(shadow)
    shadow.follow(Choice(QUESTION, Order(LIVE, None), ANSWERED), record)
    assert record.shadow is None


async def test_differences_are_summed_and_shown_as_metrics() -> None:
    """Counts by outcome, and predicted seconds of both sides, of plans that were compared."""
    shadow, registry = answering(plan(None, "decode-0", 1.5)), CollectorRegistry()
    registry.register(PolicyMetrics(lambda: CHOICE.order, shadow))
    for _ in range(4):
        await shadowed(shadow)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"breakeven_shadow_{name}_total", labels)

    assert shadow.tallies[LIVE, SHADOW].mean_difference_s == pytest.approx(-0.5)
    counted = {
        outcome: registry.get_sample_value(
            "breakeven_shadow_total", {"policy": SHADOW, "outcome": outcome}
        )
        for outcome in Outcome
    }
    assert counted == {"same": 0, "replica": 0, "shape": 4, "failed": 0}
    assert value("predicted_ttft_seconds", policy=SHADOW, plan="live") == pytest.approx(8.0)
    assert value("predicted_ttft_seconds", policy=SHADOW, plan="shadow") == pytest.approx(6.0)
