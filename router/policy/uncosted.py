"""A plan by policies that do not compare costs: pick D, then pick P among those linked to it.

Nothing of `router.policy.pair` is used, since the kill switch must hold when that one is at fault.
A prediction is made all the same, so that the audit goes on; where curves or queues give none that
is finite it is 0, which the audit takes for none. Tiers are not looked at: engines take what
they have.
"""

from collections.abc import Callable, Sequence
from math import isfinite

from kv.errors import KVError
from kv.plan import UNHINTED, Plan, Reason, Shape, Source, Span
from router.errors import NoReplicaError
from router.policy.question import Question
from router.snapshot import ReplicaView

# One of the replicas that are given, of which there is at least one.
Pick = Callable[[Sequence[ReplicaView]], ReplicaView]


def plan(question: Question, reason: Reason, pick_decode: Pick, pick_prefill: Pick) -> Plan:
    """Remote where a prefill replica has a warmed link to the picked D, else local.

    Raises `NoReplicaError` when no decode replica is routable.
    """
    snapshot = question.snapshot
    if not snapshot.decode:
        raise NoReplicaError(len(snapshot.prefill), 0)
    decode = pick_decode(snapshot.decode)
    linked = [] if question.local_only else _linked(question, decode)
    prefill = pick_prefill(linked) if linked else None
    predicted_s = _predicted_s(question, prefill, decode)
    return Plan(
        shape=Shape.LOCAL if prefill is None else Shape.REMOTE,
        reason=reason,
        prefill=prefill.name if prefill else None,
        decode=decode.name,
        spans=_spans(question.prompt_tokens, prefill or decode),
        predicted_ttft_s=predicted_s,
        cost_s=predicted_s,
        rivals=(),
        hints=UNHINTED,
    )


def in_turn(views: Sequence[ReplicaView], ticket: int) -> ReplicaView:
    """The replica whose turn it is, in the order of their names."""
    return sorted(views, key=lambda view: view.name)[ticket % len(views)]


def _linked(question: Question, decode: ReplicaView) -> list[ReplicaView]:
    snapshot = question.snapshot
    return [view for view in snapshot.prefill if (view.name, decode.name) in snapshot.links]


def _spans(prompt_tokens: int, computes: ReplicaView) -> tuple[Span, ...]:
    hit = _usable(prompt_tokens, computes)
    spans = [Span(Source.HIT, 0, hit, computes.name)] if hit else []
    return (*spans, Span(Source.COMPUTE, hit, prompt_tokens, computes.name))


def _usable(prompt_tokens: int, replica: ReplicaView) -> int:
    """An engine always computes the last token itself, since that gives the logits."""
    return max(0, min(replica.hit_tokens, prompt_tokens - 1))


def _predicted_s(question: Question, prefill: ReplicaView | None, decode: ReplicaView) -> float:
    try:
        ttft_s = _computed_s(question.prompt_tokens, prefill or decode)
        if prefill is not None:
            ttft_s += _moved_s(question, prefill, decode)
    except (ArithmeticError, ValueError, KVError):
        return 0.0
    return ttft_s if isfinite(ttft_s) and ttft_s >= 0.0 else 0.0


def _computed_s(prompt_tokens: int, replica: ReplicaView) -> float:
    """Until the replica has computed what it was given before, and then this prompt."""
    hit = _usable(prompt_tokens, replica)
    seconds = replica.waiting * replica.step_s + replica.curve.seconds(prompt_tokens - hit, hit)
    if replica.queued_tokens:
        prefills = max(1, replica.queued_prefills)
        seconds += prefills * replica.curve.seconds(replica.queued_tokens // prefills, 0)
    return seconds


def _moved_s(question: Question, prefill: ReplicaView, decode: ReplicaView) -> float:
    link = question.snapshot.links[prefill.name, decode.name]
    moved_tokens = question.prompt_tokens - _usable(question.prompt_tokens, decode)
    moved_s = link.seconds(moved_tokens * question.snapshot.kv_bytes_per_token)
    return moved_s + decode.waiting * decode.step_s
