"""Carrying a plan out: prefill on P, then decode on D behind its handoff; in a split both at once.

Whatever happens, P's blocks are either read by D or given back: when a prefill was aborted just
as it finished, when a client left between the two steps, when D refuses. A D that is lost may only
hang, and read on when it wakes: the blocks stay as they are until their lease ends. P is watched
until D has read them: over some transports a read from a P that hangs would stand still too.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import msgspec

from kv.plan import Plan, Shape, Source
from router.audit import Record
from router.fleet import Fleet
from router.head import computing_head
from router.member import Member
from router.request import Request
from workers.errors import ReplicaLostError
from workers.messages import Delta, Handoff, Role, Submit


@dataclass(slots=True)
class Attempt:
    """One try at a request; `engine_id` names it on the engines, where an id is used once.

    `keys` name the blocks of its prompt, which its replica is expected to have soon.
    """

    request: Request
    plan: Plan
    engine_id: str
    keys: Sequence[bytes]
    in_prefill: bool = False

    @property
    def computes_tokens(self) -> int:
        """Prompt tokens that the plan has computed, on whichever replica; not a split's head."""
        *_, last = self.plan.spans
        computed = (span for span in self.plan.spans if span.source is Source.COMPUTE)
        return sum(span.tokens for span in computed if span.replica == last.replica)

    @property
    def prefill(self) -> str | None:
        """Who hands the prompt off to D; nobody does in a split."""
        return None if self.plan.shape is Shape.SPLIT else self.plan.prefill

    @property
    def replica(self) -> str:
        """Whom it waits for."""
        prefill = self.prefill if self.in_prefill else None
        return prefill or self.plan.decode

    @property
    def yields(self) -> bool:
        """Whether it gives way to others on engines."""
        return self.request.patient_until_s is not None

    def expected(
        self, fleet: Fleet, name: str, tokens: int = 0, keys: Sequence[bytes] = ()
    ) -> AbstractContextManager[None]:
        """While this is on its way to a replica. Others plan by what that was sent, but for what
        gives way to them."""
        return nullcontext() if self.yields else fleet.expecting(name, tokens, keys)

    def fetching(self, fleet: Fleet, name: str) -> AbstractContextManager[None]:
        """The same of what it has a replica fetch: when that begins is for others to say, too."""
        return nullcontext() if self.yields else fleet.fetching(name, self.plan)


async def run(fleet: Fleet, attempt: Attempt, record: Record) -> AsyncGenerator[Delta, None]:
    """The decode replica's deltas, under the request's own id.

    Raises `ReplicaLostError` when a replica of the plan fails.
    """
    with ExitStack() as expected:
        expected.enter_context(_expecting(fleet, attempt))
        expected.enter_context(attempt.fetching(fleet, attempt.plan.decode))
        expected.enter_context(computing_head(fleet, attempt, record))
        handoff = unread = await _handoff(fleet, attempt, record)
        decode: Member | None = None
        try:
            decode = _member(fleet, attempt.plan.decode)
            async with decode.run(_submit(fleet, attempt, Role.DECODE, handoff)) as deltas:
                if attempt.prefill is not None:
                    prefill = _member(fleet, attempt.prefill)
                    expected.enter_context(prefill.read_by(decode, attempt.engine_id))
                async for delta in deltas:
                    expected.close()  # it has begun: the replica's reports tell
                    unread = None
                    record.decode_sources = delta.sources or record.decode_sources
                    if delta.spent is not None:
                        record.decode_spent = delta.spent
                        if not attempt.yields:  # else it took as long as others let it
                            fleet.refit.soon(attempt.plan, record)
                    yield _outward(attempt, delta, record)
        except ReplicaLostError as error:
            if error.replica == attempt.prefill:
                attempt.in_prefill = True  # D gives the blocks back when its read has ended
            elif unread is not None and (decode is None or decode.up):
                _release(fleet, attempt, unread)
            raise


def _expecting(fleet: Fleet, attempt: Attempt) -> AbstractContextManager[None]:
    """D's part in the plan: a stream to come, and the prompt's compute unless P has it."""
    if attempt.prefill is not None:
        return attempt.expected(fleet, attempt.plan.decode)
    return attempt.expected(fleet, attempt.plan.decode, attempt.computes_tokens, attempt.keys)


async def _handoff(fleet: Fleet, attempt: Attempt, record: Record) -> Handoff | None:
    """What P has for D to take; None where nobody hands off."""
    if attempt.prefill is None:
        return None
    attempt.in_prefill = True
    handoff = await _prefill(fleet, attempt, attempt.prefill, record)
    attempt.in_prefill = False
    record.handed_off()
    return handoff


async def _prefill(fleet: Fleet, attempt: Attempt, name: str, record: Record) -> Handoff:
    """P's handoff for D to take."""
    prefill = _member(fleet, name)
    submit = _submit(fleet, attempt, Role.PREFILL, None)
    unread = partial(_release, fleet, attempt)
    with (
        attempt.expected(fleet, name, attempt.computes_tokens, attempt.keys),
        attempt.fetching(fleet, name),
    ):
        async with prefill.run(submit, unread) as deltas:
            async for delta in deltas:
                record.prefill_sources = delta.sources or record.prefill_sources
                record.prefill_spent = delta.spent or record.prefill_spent
                if delta.handoff is not None:
                    return delta.handoff
    raise ReplicaLostError(name, f"{attempt.engine_id} ended without a handoff")


def _release(fleet: Fleet, attempt: Attempt, handoff: Handoff) -> None:
    decode = fleet.member(attempt.plan.decode) or next(iter(fleet.up(Role.DECODE)), None)
    if decode is not None:  # without any, P's own lease ends it
        decode.release(f"{attempt.engine_id}.release", handoff)


def _member(fleet: Fleet, name: str) -> Member:
    member = fleet.member(name)
    if member is None:
        raise ReplicaLostError(name, "gone before the request reached it")
    return member


def _submit(fleet: Fleet, attempt: Attempt, role: Role, handoff: Handoff | None) -> Submit:
    request, hints = attempt.request, attempt.plan.hints
    return Submit(
        attempt.engine_id,
        role,
        request.tokens,
        request.body,
        handoff,
        request.answered,
        hints,
        request.keep,
        patience_s=request.patience_s(fleet.now()),
    )


def _outward(attempt: Attempt, delta: Delta, record: Record) -> Delta:
    """The delta as the client's: its own id, and the tokens that any engine computed for it."""
    sources = delta.sources
    if sources is not None:
        computed = min(record.computed_tokens(), sources.prompt_tokens)
        sources = msgspec.structs.replace(sources, computed_tokens=computed)
    name = attempt.request.request_id
    changed = {"request_id": name, "handoff": None, "sources": sources, "spent": None}
    return msgspec.structs.replace(delta, **changed)
