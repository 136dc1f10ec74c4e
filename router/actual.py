"""What a request's first token really took: its seconds, bytes and computing, out of a record.

Engines tell how long a prompt waited, loaded and was computed (`workers.messages.Spent`); the
ingress knows when it planned, when P had its handoff ready and when the first token came. What is
left between the two are messages, and is told apart.
"""

from kv.parts import Action, Part, in_turn
from kv.plan import Shape
from router.audit import Record
from workers.messages import Sources, Spent

_NOT_MOVED = frozenset({"prompt_tokens", "computed_tokens", "device_tokens"})


def parts(record: Record) -> tuple[Part, ...]:
    """The parts of the last plan, as far as they ended.

    Empty where the first token came under an earlier plan: what follows it is no part of a TTFT.
    """
    plan, made_at, first_at = record.plan, record.planned_at[-1], record.first_token_at
    if first_at is not None and first_at < made_at:
        return ()
    first_s = None if first_at is None else first_at - made_at
    if plan.prefill is None:
        return _told(plan.decode, record.decode_spent, 0.0, first_s)
    handed_s = None if record.handed_off_at is None else record.handed_off_at - made_at
    prefill = _told(plan.prefill, record.prefill_spent, 0.0, handed_s)
    if plan.shape is Shape.SPLIT:  # both began with the plan
        return (*prefill, *_told(plan.decode, record.decode_spent, 0.0, first_s))
    return (*prefill, *_received(plan.decode, record.decode_spent, handed_s, first_s))


def engine_s(record: Record) -> float | None:
    """Seconds that engines were computing the prompt, other prompts' share of the same steps
    included; those of failed plans too as far as they told. None if no engine told."""
    last_s = record.computing_s()
    if last_s is None and not record.lost_engine_s:
        return None
    return record.lost_engine_s + (last_s or 0.0)


def moved_bytes(record: Record) -> dict[str, dict[str, int]]:
    """KV that came to each replica for this prompt, by where from."""
    both = {"prefill": record.prefill_sources, "decode": record.decode_sources}
    moved = {role: _moved(each, record.footprint.token_bytes) for role, each in both.items()}
    return {role: by_source for role, by_source in moved.items() if by_source}


def _moved(sources: Sources | None, token_bytes: int) -> dict[str, int]:
    if sources is None:
        return {}
    still = {name.removesuffix("_tokens") for name in _NOT_MOVED}
    by_source = sources.by_source().items()
    return {source: tokens * token_bytes for source, tokens in by_source if source not in still}


def _told(
    replica: str, spent: Spent | None, start_s: float, end_s: float | None
) -> tuple[Part, ...]:
    """A replica's part in the plan that computes: what its engine told, then what that leaves
    until `end_s`; nothing beyond where nobody knows the end."""
    told = (
        []
        if spent is None
        else [
            (Action.QUEUE, replica, spent.queued_s),
            (Action.FETCH, replica, spent.loading_s),
            (Action.COMPUTE, replica, spent.computing_s),
        ]
    )
    if end_s is not None:
        left_s = end_s - start_s - sum(seconds for *_, seconds in told)
        told.append((Action.REST, replica, left_s))
    return in_turn(told, start_s)


def _received(
    replica: str, spent: Spent | None, start_s: float | None, end_s: float | None
) -> tuple[Part, ...]:
    """D's part behind a handoff: what is neither its queue nor its step is the handoff, messages
    included, as a link's curve has it."""
    if start_s is None or end_s is None:
        return ()
    queued_s, step_s = (0.0, 0.0) if spent is None else (spent.queued_s, spent.computing_s)
    moving_s = end_s - start_s - queued_s - step_s
    steps = [
        (Action.QUEUE, replica, queued_s),
        (Action.HANDOFF, replica, moving_s),
        (Action.STEP, replica, step_s),
    ]
    return in_turn(steps, start_s)
