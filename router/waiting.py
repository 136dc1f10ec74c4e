"""Where batch requests wait for room, and who is under way at this ingress.

One queue for all tenants, in order of arrival. Each ingress decides by its own requests, which it
knows at once, and by what replicas report, which lags by a beat and has those of other ingresses.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.admission import Admission
from router.context import ServiceClass
from router.errors import DeadlineError, RoomFullError
from router.member import Member
from router.request import Request
from router.room import Crowd, Turn, Why, decide
from router.settings import BatchBounds
from workers.messages import Role

# Replicas' reports come in without a word to those that wait here.
_LOOK_EVERY_S = 0.05
_WAIT_S = (0.01, 0.1, 0.5, 1, 5, 15, 60, 150, 300, 600, 1800)


class Members(Protocol):
    """Who is up."""

    def up(self, role: Role) -> Sequence[Member]:
        """All replicas of a pool that answer."""
        ...


class Observer(Protocol):
    """Who is told how long batch requests waited, and why they were begun."""

    def begun(self, waited_s: float, why: Why) -> None: ...


class Silent:
    """Counts nothing."""

    def begun(self, waited_s: float, why: Why) -> None: ...


@dataclass(slots=True, eq=False)
class Place:
    """One request that is under way, and how long it waited for its turn."""

    service_class: ServiceClass
    tokens: int
    _room: "Room"
    _stage: str | None = None
    waited_s: float = 0.0
    # Begun by its age.
    old: bool = False

    def begin(self, why: Why | None = None) -> None:
        """It gets a plan now."""
        self.old = why is Why.AGE
        self._move("prompt")

    def answered(self) -> None:
        """It has its first token; once is enough."""
        if self._stage == "prompt":
            self._move("stream")

    def leave(self) -> None:
        """It is over, wherever it is."""
        self._move(None)

    def _move(self, stage: str | None) -> None:
        moved, self._stage = (self._stage, stage), stage
        self._room.moved(self, *moved)


@dataclass(slots=True, eq=False)
class _Waiter:
    since_s: float
    place: Place
    turn: asyncio.Future[Turn]


class Room:
    """The waiting room of one ingress; `now` is the event loop's clock."""

    def __init__(
        self,
        members: Members,
        bounds: BatchBounds,
        now: Callable[[], float],
        observer: Observer | None = None,
    ) -> None:
        self._members, self._bounds, self._now = members, bounds, now
        self._observer = observer or Silent()
        self._admission = Admission(bounds.max_requests, RoomFullError)
        self._counts: Counter[tuple[ServiceClass, str]] = Counter()
        # Prompt tokens of batch requests that were begun.
        self._tokens = 0
        self._old_prompts = 0
        self._queue: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def admissions(self, interactive: Admission) -> dict[ServiceClass, Admission]:
        """What bounds the requests of each class, with that of interactive ones."""
        return {ServiceClass.INTERACTIVE: interactive, ServiceClass.BATCH: self._admission}

    @property
    def waiting(self) -> int:
        """Batch requests that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Batch requests that were begun."""
        batch = ServiceClass.BATCH
        return self._counts[batch, "prompt"] + self._counts[batch, "stream"]

    @property
    def oldest_s(self) -> float:
        """How long the first of those that wait has waited."""
        return self._now() - self._queue[0].since_s if self._queue else 0.0

    @asynccontextmanager
    async def turn(self, request: Request) -> AsyncIterator[tuple[Request, Place]]:
        """For as long as a request is under way: the request as it is to run, once there is room
        for it. Raises `DeadlineError` when its time is over before."""
        place = Place(request.context.service_class, request.prompt_tokens, self)
        try:
            if place.service_class is ServiceClass.BATCH:
                request = await self._awaited(request, place)
            else:
                place.begin()
            yield request, place
        finally:
            place.leave()

    def crowd(self) -> Crowd:
        """What this ingress knows of the load."""
        decode = self._members.up(Role.DECODE)
        prefill = self._members.up(Role.PREFILL)
        computing = prefill or decode
        reported = sum(
            m.load.pending_prefills - m.load.yielding.pending_prefills for m in computing
        )
        # What a decode replica computes beside prefill replicas keeps none of these from anything.
        sent = sum(member.requests - member.yielding for member in prefill)
        own, streams = self._counts, sum(m.load.running + m.load.waiting for m in decode)
        capacity = sum(m.replica.kv_blocks * m.replica.block_tokens for m in decode) or 1
        held = sum(m.load.yielding.kv_usage for m in decode) / (len(decode) or 1)
        return Crowd(
            computing=len(computing),
            urgent_prompts=max(
                reported, sent if prefill else own[ServiceClass.INTERACTIVE, "prompt"]
            ),
            batch_prompts=own[ServiceClass.BATCH, "prompt"],
            streams=max(streams, own.total()),
            seats=sum(member.replica.max_num_seqs for member in decode),
            kv_usage=min((member.load.kv_usage for member in decode), default=0.0),
            batch_kv=max(held, self._tokens / capacity),
            next_kv=self._queue[0].place.tokens / capacity if self._queue else 0.0,
            old_prompts=self._old_prompts,
        )

    def moved(self, place: Place, before: str | None, after: str | None) -> None:
        """A request is at another stage."""
        for stage, change in ((before, -1), (after, 1)):
            if stage is not None:
                self._counts[place.service_class, stage] += change
                if place.service_class is ServiceClass.BATCH:
                    self._tokens += change * place.tokens
                self._old_prompts += change * (place.old and stage == "prompt")
        if before is not None and self._queue:
            asyncio.get_running_loop().call_soon(self._let_in)

    async def _awaited(self, request: Request, place: Place) -> Request:
        """A batch request at its turn, with what is left of its patience."""
        context, since_s = request.context, self._now()
        try:
            async with asyncio.timeout(context.timeout_s):
                turn = await self._stand(_Waiter(since_s, place, asyncio.Future()))
        except TimeoutError as error:
            raise DeadlineError(context.request_id, context.timeout_s or 0.0) from error
        place.waited_s = self._now() - since_s
        self._observer.begun(place.waited_s, turn.why)
        until_s = None if turn.why is Why.AGE else since_s + self._bounds.max_age_s
        return replace(request, patient_until_s=until_s)

    async def _stand(self, waiter: _Waiter) -> Turn:
        self._queue.append(waiter)
        self._let_in()
        if self._queue and self._timer is None:
            self._look_later()
        try:
            return await waiter.turn
        finally:
            with suppress(ValueError):
                self._queue.remove(waiter)

    def _look_later(self) -> None:
        """Until nobody waits."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_LOOK_EVERY_S, self._look) if self._queue else None

    def _look(self) -> None:
        self._let_in()
        self._look_later()

    def _let_in(self) -> None:
        while self._queue:
            turn = decide(self.crowd(), self.oldest_s, self._bounds)
            if not turn.begun:
                return
            waiter = self._queue.popleft()
            if not waiter.turn.done():  # else it was cancelled, and is about to leave
                waiter.place.begin(turn.why)
                waiter.turn.set_result(turn)


class RoomMetrics(Collector):
    """The room's observer, and what of it can be seen at a time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.room: Room | None = None
        self._waits = Histogram(
            "breakeven_batch_wait_seconds",
            "How long batch requests waited for room, by why they were begun",
            ["reason"],
            buckets=_WAIT_S,
            registry=registry,
        )
        registry.register(self)

    def begun(self, waited_s: float, why: Why) -> None:
        self._waits.labels(why).observe(waited_s)

    def collect(self) -> Iterator[Metric]:
        room = self.room
        if room is None:
            return
        yield GaugeMetricFamily(
            "breakeven_batch_waiting", "Batch requests that wait for room", room.waiting
        )
        yield GaugeMetricFamily(
            "breakeven_batch_running", "Batch requests that were begun", room.running
        )
        yield GaugeMetricFamily(
            "breakeven_batch_oldest_wait_seconds",
            "How long the first of those that wait has waited",
            room.oldest_s,
        )
