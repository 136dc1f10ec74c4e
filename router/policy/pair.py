"""Which replicas serve a request, and whether its prompt is computed on P or on D.

Costs are predicted seconds. Three are not the request's own: a prefill on a decode replica stalls
every stream that runs there for as long as it takes, one more stream lengthens every step, and
what is computed twice is paid for twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kv.plan import Plan, Reason, Rival, Shape, Source, Span
from router.errors import NoReplicaError
from router.snapshot import ReplicaView, Snapshot


@dataclass(frozen=True, slots=True)
class Question:
    """One request against one snapshot.

    `assumed_streams` is how many streams are taken to run on a decode replica that is idle now:
    they are whom a prefill there would stall if they came while it lasts. `compute_price` is how
    many seconds of waiting a second of computing is worth. `ticket` numbers the questions of an
    ingress, for policies that take turns.
    """

    prompt_tokens: int
    snapshot: Snapshot
    assumed_streams: float
    local_only: bool = False
    compute_price: float = 0.1
    ticket: int = 0


@dataclass(frozen=True, slots=True)
class _Candidate:
    shape: Shape
    prefill: ReplicaView | None
    decode: ReplicaView
    predicted_ttft_s: float
    cost_s: float

    def rank(self) -> tuple[float, str, str, str]:
        """Cheapest first; ties by name, so that equal snapshots give equal plans."""
        prefill = self.prefill.name if self.prefill else ""
        return self.cost_s, self.shape, self.decode.name, prefill


def choose(question: Question) -> Plan:
    """The cheapest plan. Raises `NoReplicaError` when no decode replica is routable."""
    snapshot = question.snapshot
    candidates = [_local(question, decode) for decode in snapshot.decode]
    if not question.local_only:
        candidates += _remotes(question)
    if not candidates:
        raise NoReplicaError(len(snapshot.prefill), len(snapshot.decode))
    best, *others = sorted(candidates, key=_Candidate.rank)
    return Plan(
        shape=best.shape,
        reason=_reason(question, best, len(candidates)),
        prefill=best.prefill.name if best.prefill else None,
        decode=best.decode.name,
        spans=_spans(question.prompt_tokens, best.prefill or best.decode),
        predicted_ttft_s=best.predicted_ttft_s,
        cost_s=best.cost_s,
        rivals=tuple(_rival(other) for other in others),
    )


def _local(question: Question, decode: ReplicaView) -> _Candidate:
    compute_s = _compute_s(question.prompt_tokens, decode)
    ttft_s = _queue_s(decode) + compute_s
    stalled = max(float(decode.running), question.assumed_streams)
    cost_s = ttft_s + (stalled + question.compute_price) * compute_s + _crowding_s(decode)
    return _Candidate(Shape.LOCAL, None, decode, ttft_s, cost_s)


def _remotes(question: Question) -> Iterator[_Candidate]:
    snapshot, n = question.snapshot, question.prompt_tokens
    for prefill in snapshot.prefill:
        compute_s = _compute_s(n, prefill)
        computed_s = _queue_s(prefill) + compute_s
        for decode in snapshot.decode:
            link = snapshot.links.get((prefill.name, decode.name))
            if link is None:
                continue
            moved_bytes = (n - _usable(n, decode)) * snapshot.kv_bytes_per_token
            # A link's curve ends at the first token, so D's own step is in it.
            ttft_s = computed_s + link.seconds(moved_bytes) + decode.waiting * decode.step_s
            cost_s = ttft_s + question.compute_price * compute_s + _crowding_s(decode)
            yield _Candidate(Shape.REMOTE, prefill, decode, ttft_s, cost_s)


def _compute_s(prompt_tokens: int, replica: ReplicaView) -> float:
    hit = _usable(prompt_tokens, replica)
    return replica.curve.seconds(prompt_tokens - hit, hit)


def _usable(prompt_tokens: int, replica: ReplicaView) -> int:
    """An engine always computes the last token itself, since that gives the logits."""
    return min(replica.hit_tokens, prompt_tokens - 1)


def _queue_s(replica: ReplicaView) -> float:
    """Until the replica has computed what it was given before."""
    waiting_s = replica.waiting * replica.step_s
    if not replica.queued_tokens:
        return waiting_s
    # Each prompt is a prefill of its own: one of their sum would cost its square.
    prefills = max(1, replica.queued_prefills)
    return waiting_s + prefills * replica.curve.seconds(replica.queued_tokens // prefills, 0)


def _crowding_s(decode: ReplicaView) -> float:
    """What one more stream costs those that run: spreads streams over idle replicas."""
    full = decode.running >= decode.max_num_seqs
    return decode.running * decode.step_s * (decode.max_num_seqs if full else 1)


def _reason(question: Question, best: _Candidate, candidates: int) -> Reason:
    if question.local_only:
        return Reason.PROMPT_LOGPROBS
    if question.snapshot.blind:
        return Reason.NO_CATALOGUE
    if candidates == 1:
        return Reason.ONLY_REPLICA
    if not question.snapshot.prefill:
        return Reason.NO_PREFILL_REPLICA
    return Reason.CHEAPER_LOCAL if best.shape is Shape.LOCAL else Reason.CHEAPER_REMOTE


def _spans(prompt_tokens: int, computes: ReplicaView) -> tuple[Span, ...]:
    hit = _usable(prompt_tokens, computes)
    spans = [Span(Source.HIT, 0, hit, computes.name)] if hit else []
    return (*spans, Span(Source.COMPUTE, hit, prompt_tokens, computes.name))


def _rival(candidate: _Candidate) -> Rival:
    return Rival(
        shape=candidate.shape,
        prefill=candidate.prefill.name if candidate.prefill else None,
        decode=candidate.decode.name,
        predicted_ttft_s=candidate.predicted_ttft_s,
        cost_s=candidate.cost_s,
    )
