"""The path of one request: admit, name its blocks, look, plan, run, stream, audit."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

from kv.block import pack_tokens
from kv.plan import Reason
from router.admission import Admission
from router.audit import Audit, Record
from router.context import Bound, ServiceClass
from router.deadline import Deadline
from router.errors import NoReplicaError, RequestLostError, RouterError
from router.fleet import Fleet
from router.planner import Planner
from router.request import Request
from router.run import Attempt, run
from router.settings import BatchBounds
from router.shadow import Shadow
from router.waiting import Place, Room
from workers.errors import WorkerError
from workers.messages import Delta, Role

# Replicas may fail under a request; after this many plans it is the request that is at fault.
MAX_PLANS = 4
# A replica that dropped us, or that we dropped, is back with its next probe; one that died is not.
COMES_BACK_S = 5.0


class Pipeline:
    """Serves requests over a fleet. One an ingress; it keeps no state of a request."""

    def __init__(
        self,
        fleet: Fleet,
        planner: Planner,
        shadow: Shadow,
        admission: Admission,
        audit: Audit,
        now: Callable[[], float],
        room: Room | None = None,
    ) -> None:
        self._fleet, self._planner, self._shadow = fleet, planner, shadow
        self._audit, self._now = audit, now
        self._room = room or Room(fleet, BatchBounds(), now)
        self._admissions = self._room.admissions(admission)

    async def serve(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The deltas of one request, until one has a finish reason.

        Raises a `RouterError` when nobody can serve it. Closing the iterator aborts the request
        on every engine.
        """
        async with self._admit(request) as (request, place):  # 1 admit
            request, record = await self._planned(request, place.waited_s)  # 2 to 4
            request.notes.used_tokens += request.prompt_tokens
            deadline = Deadline(request.context, place.waited_s)
            try:
                async with aclosing(self._run(request, record)) as deltas:  # 5 run
                    async for delta in deltas:
                        place.answered()
                        self._audit.delta(record, delta)
                        request.notes.used_tokens += len(delta.token_ids)
                        yield delta  # 6 stream
                        record.outcome = delta.finish_reason or record.outcome
            except RouterError:
                record.outcome = "failed"
                raise
            except asyncio.CancelledError as ended:
                record.outcome = ended.args[0] if ended.args else record.outcome
                deadline.check(record.outcome)
                raise
            finally:
                deadline.stop()
                self._audit.close(record)  # 7 audit

    def check(self, n: int, asked: Bound | None = None) -> None:
        """Raise what `serve` would raise for `n` requests now, where a status can be sent; of the
        call that is `asked`, keep their places until it ends."""
        if asked is None:
            self._admissions[ServiceClass.INTERACTIVE].check(n)
        else:
            self._admissions[asked.context.service_class].reserve(n, asked.notes)
        if not self._fleet.up(Role.DECODE):
            raise NoReplicaError(len(self._fleet.up(Role.PREFILL)), 0)

    @asynccontextmanager
    async def _admit(self, request: Request) -> AsyncIterator[tuple[Request, Place]]:
        """A place for it, and a batch request's turn."""
        async with AsyncExitStack() as held:
            try:
                admission = self._admissions[request.context.service_class]
                held.enter_context(admission.admit(request.notes))
                turn = await held.enter_async_context(self._room.turn(request))
            except RouterError as error:
                self._audit.refuse(request, error)
                raise
            yield turn

    async def _planned(self, request: Request, waited_s: float) -> tuple[Request, Record]:
        """2 name its blocks, 3 look and take a snapshot, 4 plan; the request is under the names
        that the plan goes by."""
        began = self._now()
        try:
            request, choice = await self._planner.plan(request)
        except RouterError as error:
            self._audit.refuse(request, error)
            raise
        request.notes.plan = choice.plan.header()
        record = self._audit.open(request, choice.plan, began, choice.footprint, waited_s)
        self._shadow.follow(choice, record)
        return request, record

    async def _run(self, request: Request, record: Record) -> AsyncGenerator[Delta, None]:
        """Carry the plan out; when a replica fails, go on elsewhere with what it has not given."""
        failed: set[str] = set()
        for number in range(MAX_PLANS):
            keys = self._planner.keys(request)
            attempt = Attempt(request, record.plan, f"{request.request_id}.{number}", keys)
            answered = bytearray(request.answered)
            try:
                async with aclosing(run(self._fleet, attempt, record)) as deltas:
                    async for delta in deltas:
                        answered += pack_tokens(delta.token_ids)
                        yield delta
                return
            except WorkerError as error:
                request = request.behind(bytes(answered))
                await self._check_goes_on(request, number, error)
            failed.add(attempt.replica)
            await self._replan(request, attempt, record, failed)

    async def _check_goes_on(self, request: Request, number: int, error: WorkerError) -> None:
        """Raise unless another plan may follow the one of this number, which `error` ended."""
        name = request.context.request_id
        if request.answered and request.uncarried is not None:
            raise RequestLostError(name, f"{error}; {request.uncarried} cannot be carried on")
        if number + 1 == MAX_PLANS:
            raise RequestLostError(name, f"{MAX_PLANS} plans failed, the last: {error}") from error
        if not await self._fleet.anybody(Role.DECODE, COMES_BACK_S):
            raise RequestLostError(name, f"{error}; no other replica is up") from error

    async def _replan(
        self, request: Request, attempt: Attempt, record: Record, failed: Collection[str]
    ) -> None:
        began = self._now()
        reason = Reason.PREFILL_LOST if attempt.in_prefill else Reason.DECODE_LOST
        _, choice = await self._planner.plan(request, avoid=failed)
        plan = choice.plan.because(reason)
        request.notes.plan = plan.header()
        self._audit.plan(record, plan, self._now() - began)
        self._shadow.follow(choice, record)
