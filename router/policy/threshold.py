"""Baselines: a cached prefix is fetched by a fixed rule, whatever that or computing it would take.

Others compare the tokens that could be fetched with a constant which somebody has measured once:
LMCache's `min_retrieve_tokens`, llm-d's least gain of a pull. Fetching always and computing always
are the two ends of it. Replicas are chosen as the kill switch does, but an idle decode replica does
without a prefill replica: a handoff would only cost time there.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf, isfinite

from kv.plan import Hints, Plan, Reason, Shape, Source, Span
from router.columns import TIER_ORDER
from router.policy import least_loaded
from router.policy.question import Question
from router.snapshot import ReplicaView

# A fetch that was begun is waited for: the rule knows of no time.
_PATIENCE_S = 600.0


def choose(question: Question) -> Plan:
    """Fetch where that saves computing at least `Question.fetch_tokens`.

    Raises `NoReplicaError` when no decode replica is routable.
    """
    return _plan(question, Reason.THRESHOLD, question.fetch_tokens)


def always_fetch(question: Question) -> Plan:
    """Fetch all that a tier holds. Raises as `choose`."""
    return _plan(question, Reason.ALWAYS_FETCH, 1)


def always_compute(question: Question) -> Plan:
    """Take nothing from tiers. Raises as `choose`."""
    return _plan(question, Reason.ALWAYS_COMPUTE, inf)


def _plan(question: Question, reason: Reason, least_tokens: float) -> Plan:
    base = _base(question)
    pools = (*question.snapshot.prefill, *question.snapshot.decode)
    view = next(view for view in pools if view.name == (base.prefill or base.decode))
    hit = min(view.hit_tokens, question.prompt_tokens - 1)
    fetched = tuple(_fetched(view, hit, question.prompt_tokens))
    reach = fetched[-1].end_token if fetched else hit
    if question.local_only or reach - hit < max(1, least_tokens):
        return replace(base, reason=reason, hints=Hints(hit))
    spans = [Span(Source.HIT, 0, hit, view.name)] if hit else []
    predicted_s = _predicted_s(question, base, view, fetched)
    return replace(
        base,
        shape=Shape.FETCH if base.prefill is None else Shape.FETCH_REMOTE,
        reason=reason,
        spans=(*spans, *fetched, Span(Source.COMPUTE, reach, question.prompt_tokens, view.name)),
        predicted_ttft_s=predicted_s,
        cost_s=predicted_s,
        hints=Hints(reach, tuple(span.tier for span in fetched if span.tier), _PATIENCE_S),
    )


def _base(question: Question) -> Plan:
    base = least_loaded.choose(question)
    view = next(view for view in question.snapshot.decode if view.name == base.decode)
    if view.running or view.waiting or view.queued_tokens:
        return base
    return least_loaded.choose(replace(question, local_only=True))


def _fetched(view: ReplicaView, hit: int, prompt_tokens: int) -> Iterator[Span]:
    """What its tiers would bring, in the order in which its engine asks them."""
    end, held = hit, {each.tier: each.hit_tokens for each in view.tiers}
    for tier in TIER_ORDER:
        # An engine always computes the last token itself, since that gives the logits.
        reach = min(held.get(tier, 0), prompt_tokens - 1)
        if reach > end:
            yield Span(Source.FETCH, end, reach, view.name, tier)
            end = reach


def _predicted_s(
    question: Question, base: Plan, view: ReplicaView, fetched: tuple[Span, ...]
) -> float:
    """The base's, with the fetches in the place of what need not be computed; 0 is none."""
    start, reach, n = fetched[0].start_token, fetched[-1].end_token, question.prompt_tokens
    curves = {each.tier: each.curve for each in view.tiers}
    moving_s = sum(
        curves[span.tier].seconds(span.tokens * question.snapshot.kv_bytes_per_token)
        for span in fetched
        if span.tier
    )
    saved_s = view.curve.seconds(n - start, start) - view.curve.seconds(n - reach, reach)
    found_s = base.predicted_ttft_s + moving_s - saved_s
    return found_s if base.predicted_ttft_s and isfinite(found_s) and found_s > 0.0 else 0.0
