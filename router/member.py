"""One replica as this ingress sees it: its link, its load, and the requests it runs for us."""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager

from kv.catalogue import Tier
from router.speed import Speed, speed_of
from workers.errors import ReplicaLostError, WorkerError
from workers.messages import (
    Abort,
    Blocks,
    Delta,
    Forget,
    Forgotten,
    Handoff,
    Link,
    Load,
    Release,
    Replica,
    Reply,
    Reset,
    Resync,
    Step,
    Submit,
    Welcome,
)

logger = logging.getLogger(__name__)

# A finished prefill whose handoff crossed our abort on the wire arrives within this.
_ORPHAN_S = 5.0
# A probe that is not answered is sent anew after this.
_PROBE_AGAIN_S = 5.0


class Member:
    """Follows one engine, from its welcome until it is lost.

    An `Inbox` for its link. `on_blocks` gets every change of what it holds, in order; `on_change`
    is told whenever it is up or down, or has more or less to do than before. With `probe`, it is
    up only once its engine has answered such a request: a process that welcomes may still hang.
    """

    def __init__(
        self,
        replica: Replica,
        connect: Callable[["Member"], Link],
        on_blocks: Callable[["Member", Blocks], None],
        now: Callable[[], float],
        probe: Callable[[], Submit] | None = None,
        on_change: Callable[["Member"], None] = lambda member: None,
        speed: Speed | None = None,
    ) -> None:
        self.replica = replica
        self.load = Load()
        self.up = False
        self.speed = speed or speed_of(replica)
        self._on_blocks, self._now, self._probe = on_blocks, now, probe
        self._on_change = on_change
        self._probing: tuple[str, float] | None = None
        self.heard_at = now()
        self._sequence: int | None = None
        self._answers: dict[str, asyncio.Queue[Delta | WorkerError]] = {}
        # Bytes that plans of this ingress have it fetch now, by tier.
        self.fetching: Counter[Tier] = Counter()
        # Those of them that give way to others.
        self._yielding: set[str] = set()
        self._orphans: dict[str, tuple[float, Callable[[Handoff], None]]] = {}
        self._readers: list[Callable[[WorkerError], None]] = []
        self._orders: dict[str, asyncio.Future[Forgotten]] = {}
        self._order_ids = map(str, itertools.count())
        self._link = connect(self)

    @property
    def name(self) -> str:
        return self.replica.name

    @property
    def requests(self) -> int:
        """Requests that it runs for this ingress."""
        return len(self._answers)

    @property
    def yielding(self) -> int:
        """How many of them give way to others."""
        return len(self._yielding)

    @asynccontextmanager
    async def run(
        self,
        submit: Submit,
        unread: Callable[[Handoff], None] | None = None,
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """Start a request; its deltas follow until one has a finish reason.

        Raises `ReplicaLostError` when the replica is lost, refuses or fails. Leaving the block
        early aborts the request; should a prefill have finished all the same, its handoff goes
        to `unread`.
        """
        request_id = submit.request_id
        answers: asyncio.Queue[Delta | WorkerError] = asyncio.Queue()
        self._answers[request_id] = answers
        if submit.patience_s is not None:
            self._yielding.add(request_id)
        self._on_change(self)
        self._link.send(submit)
        try:
            async with aclosing(self._deltas(request_id, answers)) as deltas:
                yield deltas
        finally:
            if unread is not None:
                self._take_unread(request_id, answers, unread)
            unfinished = self._answers.pop(request_id, None) is not None
            self._yielding.discard(request_id)
            self._on_change(self)
            if unfinished and self.up:
                self._link.send(Abort([request_id]))

    async def _deltas(
        self, request_id: str, answers: "asyncio.Queue[Delta | WorkerError]"
    ) -> AsyncGenerator[Delta]:
        while True:
            answer = await answers.get()
            if isinstance(answer, WorkerError):
                raise answer
            if answer.error is not None or answer.finish_reason == "error":
                complaint = answer.error or "an internal error ended it"
                raise ReplicaLostError(self.name, f"{request_id}: {complaint}")
            yield answer
            if answer.finish_reason is not None:
                return

    def _take_unread(
        self,
        request_id: str,
        answers: "asyncio.Queue[Delta | WorkerError]",
        unread: Callable[[Handoff], None],
    ) -> None:
        """What arrived and was not read goes now; what is still on the wire, when it comes."""
        while not answers.empty():
            answer = answers.get_nowait()
            if isinstance(answer, Delta) and answer.handoff is not None:
                unread(answer.handoff)
        if request_id in self._answers:
            now = self._now()
            self._orphans = {k: v for k, v in self._orphans.items() if v[0] > now}
            self._orphans[request_id] = (now + _ORPHAN_S, unread)

    @contextmanager
    def read_by(self, reader: "Member", request_id: str) -> Iterator[None]:
        """While the block lasts, a request on `reader` takes KV from here: it fails when this
        replica is lost. A read from a process that hangs has no end of its own."""

        def fail(error: WorkerError) -> None:
            answers = reader._answers.get(request_id)
            if answers is not None:
                answers.put_nowait(error)

        self._readers.append(fail)
        try:
            yield
        finally:
            self._readers.remove(fail)

    def release(self, request_id: str, handoff: Handoff) -> None:
        """Have this decode replica tell the prefill side that nobody will read `handoff`."""
        self._link.send(Release(request_id, handoff))

    def reset(self) -> None:
        """Have it drop every block that it caches, unless a request holds some just then."""
        self._link.send(Reset())

    async def forget(self, tags: tuple[str, ...]) -> Forgotten:
        """Have it erase the blocks of these tags. Raises `ReplicaLostError` when it is lost
        before it has said that it did."""
        order_id = next(self._order_ids)
        done: asyncio.Future[Forgotten] = asyncio.get_running_loop().create_future()
        self._orders[order_id] = done
        self._link.send(Forget(order_id, tags))
        try:
            return await done
        finally:
            self._orders.pop(order_id, None)

    def receive(self, reply: Reply) -> None:
        """Whatever the replica says."""
        self.heard_at = self._now()
        match reply:
            case Step(deltas=deltas):
                for delta in deltas:
                    self._answer(delta)
            case Load():
                self.load = reply
                self._on_change(self)
                self._probe_again()
            case Blocks():
                self._blocks(reply)
            case Welcome(replica=replica):
                self._welcome(replica)
            case Forgotten():
                done = self._orders.get(reply.order_id)
                if done is not None and not done.done():
                    done.set_result(reply)

    def lose(self, complaint: str) -> None:
        """It is down: everything it ran for us fails, and so does what it would say later."""
        self.up, self._probing = False, None
        for answers in self._answers.values():
            answers.put_nowait(ReplicaLostError(self.name, complaint))
        self._answers.clear()
        self._yielding.clear()
        self._on_change(self)
        for fail in self._readers:
            fail(ReplicaLostError(self.name, complaint))
        for done in self._orders.values():
            if not done.done():
                done.set_exception(ReplicaLostError(self.name, complaint))

    def close(self) -> None:
        """Lose it for good."""
        self.lose("left the cluster")
        self._link.close()

    def _welcome(self, replica: Replica) -> None:
        # A second welcome means that the replica had dropped us, and our requests with us.
        self.lose("dropped this ingress")
        self._sequence = None
        if replica.epoch == self.replica.epoch:
            self._prove()

    def _prove(self) -> None:
        """Up at the answer of a probe; at once where none is asked for."""
        if self._probe is None:
            self.up = True
            self._on_change(self)
            return
        submit = self._probe()
        self._probing = (submit.request_id, self._now())
        self._link.send(submit)

    def _probe_again(self) -> None:
        if self._probing is not None and self._now() - self._probing[1] > _PROBE_AGAIN_S:
            self._link.send(Abort([self._probing[0]]))
            self._prove()

    def _proved(self, delta: Delta) -> None:
        """The probe's answer; a refused one is sent again in a while."""
        if delta.error is not None or delta.finish_reason == "error":
            logger.warning("%s refused a probe: %s", self.name, delta.error)
            return
        self._probing, self.up = None, True
        self._on_change(self)

    def _answer(self, delta: Delta) -> None:
        if self._probing is not None and delta.request_id == self._probing[0]:
            self._proved(delta)
            return
        answers = self._answers.get(delta.request_id)
        if answers is not None:
            if delta.finish_reason is not None:
                del self._answers[delta.request_id]
                self._yielding.discard(delta.request_id)
                self._on_change(self)
            answers.put_nowait(delta)
        elif delta.handoff is not None and delta.request_id in self._orphans:
            self._orphans.pop(delta.request_id)[1](delta.handoff)

    def _blocks(self, blocks: Blocks) -> None:
        expected = None if self._sequence is None else self._sequence + 1
        if not blocks.snapshot and blocks.sequence != expected:
            if expected is not None:  # a gap: one resync, and silence until it is answered
                self._sequence = None
                self._link.send(Resync())
            return
        self._sequence = blocks.sequence
        self._on_blocks(self, blocks)


def tier_bytes(member: Member, tier: Tier) -> int:
    """Bytes of KV that a tier behind a replica's paged KV holds, as the replica last told."""
    told, replica = member.load.tiers.get(tier), member.replica
    blocks = 0 if told is None else told.blocks
    return blocks * replica.block_tokens * replica.kv_bytes_per_token
