"""A replica's end of the direct channel: ZMQ ROUTER in front of the engine.

Runs on the replica's event loop; the engine's thread hands it step reports. One ingress's
requests die with it: an ingress that says nothing for `SILENCE_S` has its requests aborted.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import msgspec
import zmq
import zmq.asyncio

from kv.block import KEY_BYTES, unpack_tokens
from kv.catalogue import Tier
from workers import curve
from workers import messages as wire
from workers.errors import EngineDeadError, WireError

if TYPE_CHECKING:
    from workers.engine import Engine, StepReport
    from workers.erasure import Erased
    from workers.mirror import Change

logger = logging.getLogger(__name__)

# An ingress says Hello every second; ten missed ones mean that it is gone or hangs.
SILENCE_S = 10.0
# A process that did nothing for so long was stopped; its ingresses have given it up.
_LAPSE_S = SILENCE_S
_BEAT_S = 0.25
_LOAD_EVERY_S = 1.0
# A step of a large model may take seconds; a loop that stands for longer hangs.
_STALL_S = 30.0
# How long the handoff of an aborted prefill may still come.
_LATE_S = 5.0
# A snapshot goes in pieces: a catalogue takes in 2,048 blocks in about a millisecond and answers
# ingresses in between.
_SNAPSHOT_BYTES = 2048 * KEY_BYTES
# Messages queued for an ingress that does not read, before it is taken for lost.
_BACKLOG = 100_000


@dataclass(slots=True)
class _Peer:
    """One connected ingress."""

    ingress: str
    heard_at: float
    sequence: int = 0
    following: bool = False
    requests: set[str] = field(default_factory=set)


class ReplicaServer:
    """Carries out what ingresses ask of one engine, and tells them what it does."""

    def __init__(self, host: str, keys: curve.ServerKeys) -> None:
        self._keys = keys
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, _BACKLOG)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        curve.lock(self._socket, keys)
        self.address = curve.bind(self._socket, host)
        self._peers: dict[bytes, _Peer] = {}
        self._owner: dict[str, bytes] = {}
        self._load = wire.Load()
        self._load_sent = (self._load, 0.0)
        self._lanes: tuple[str, ...] = ()
        self._aborted: dict[str, tuple[bytes, float]] = {}
        self._void: set[bytes] = set()
        self._awake_at = time.monotonic()
        self._draining = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def serve(self, engine: "Engine", replica: wire.Replica) -> None:
        """Until cancelled: answer messages, beat, and drop peers that fell silent."""
        self._engine, self._replica = engine, replica
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(curve.admit(self._context, self._keys))
                tasks.create_task(self._receive())
                tasks.create_task(self._beat())
        finally:
            self._context.destroy(linger=0)

    def report(self, report: "StepReport") -> None:
        """A step's outcome; called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._publish, report, time.time())

    def show_lanes(self, lanes: tuple[str, ...]) -> None:
        """The transports that UCX chose, as far as known."""
        self._lanes = lanes

    async def drain(self) -> None:
        """Ask for no more work, and wait until no ingress waits for tokens and no finished
        prefill to be read."""
        self._draining = True
        await asyncio.sleep(2 * _BEAT_S)  # until ingresses know, and what was on its way is here
        await self._quiet.wait()

    def _note_quiet(self) -> None:
        if self._owner or self._load.leased:
            self._quiet.clear()
        else:
            self._quiet.set()

    # ------------------------------------------------------------------ what comes in

    async def _receive(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                self._handle(identity, wire.decode_request(b"".join(frames), identity.hex()))
            except WireError as error:
                logger.warning("message dropped: %s", error)
            # Messages that are there already do not give the loop a turn.
            await asyncio.sleep(0)

    def _handle(self, identity: bytes, message: wire.Request) -> None:
        self._notice_lapse(time.monotonic())
        if identity in self._void:
            return
        match message:
            case wire.Hello():
                self._hello(identity, message)
            case wire.Submit():
                self._submit(identity, message)
            case wire.Abort(request_ids=request_ids):
                self._abort(request_ids)
            case wire.Release(request_id=request_id, handoff=handoff):
                self._release(request_id, handoff)
            case wire.Resync():
                self._snapshot(identity)
            case wire.Reset():
                self._engine.forget()
            case wire.Forget(order_id=order_id, tags=tags):
                self._forget(identity, order_id, tags)

    def _notice_lapse(self, now: float) -> None:
        """After this process has stood still, every connection from before is void: its ingress
        has given this replica up, and what it had asked must not be begun now, since the pages
        behind its handoffs may be another prompt's. One that still listens connects anew."""
        lapse_s, self._awake_at = now - self._awake_at, now
        if lapse_s > _LAPSE_S:
            self._void |= set(self._peers)
            for identity in list(self._peers):
                self._drop(identity, f"this replica stood still for {lapse_s:.0f} s")

    def _hello(self, identity: bytes, hello: wire.Hello) -> None:
        peer = self._peers.get(identity)
        if peer is not None:
            peer.heard_at = time.monotonic()
            return
        self._peers[identity] = _Peer(hello.ingress, time.monotonic())
        self._send(identity, wire.Welcome(self._replica))
        self._send(identity, self._current_load())
        if hello.follow:
            self._snapshot(identity)

    def _snapshot(self, identity: bytes) -> None:
        # Taken on the engine's thread, between two steps, so that the deltas which follow it
        # are exactly those that it lacks.
        def follow(keys: Mapping[Tier, bytes]) -> None:
            self._loop.call_soon_threadsafe(self._follow, identity, keys)

        self._engine.snapshot(follow)

    def _forget(self, identity: bytes, order_id: str, tags: tuple[str, ...]) -> None:
        def tell(erased: "Erased") -> None:
            done = wire.Forgotten(order_id, erased.blocks, erased.in_use)
            self._loop.call_soon_threadsafe(self._send, identity, done)

        self._engine.erase(tags, tell)

    def _follow(self, identity: bytes, keys: Mapping[Tier, bytes]) -> None:
        peer = self._peers.get(identity)
        if peer is None:
            return
        peer.following = True
        pieces = [
            (tier, held[start : start + _SNAPSHOT_BYTES])
            for tier, held in keys.items()
            for start in range(0, len(held), _SNAPSHOT_BYTES)
        ]
        tier, stored = pieces[0] if pieces else (Tier.DEVICE, b"")
        self._send(identity, wire.Blocks(peer.sequence, stored=stored, snapshot=True, tier=tier))
        for tier, stored in pieces[1:]:
            peer.sequence += 1
            self._send(identity, wire.Blocks(peer.sequence, stored=stored, tier=tier))

    def _submit(self, identity: bytes, message: wire.Submit) -> None:
        from workers import work

        peer = self._peers.get(identity)
        if peer is None:
            return
        try:
            answered = message.answered if message.role is wire.Role.DECODE else b""
            request = work.engine_request(message)
            told = (message.hints, message.keep, message.patience_s)
            self._engine.add(request, unpack_tokens(answered), *told)
        except Exception as error:  # the wire's edge: one bad request must not end the replica
            logger.warning("%s refused: %s", message.request_id, type(error).__name__)
            refusal = wire.Delta(message.request_id, [], finish_reason="error", error=str(error))
            self._send(identity, wire.Step([refusal]))
            return
        peer.requests.add(message.request_id)
        self._owner[message.request_id] = identity
        self._note_quiet()

    def _abort(self, request_ids: list[str]) -> None:
        deadline = time.monotonic() + _LATE_S
        for request_id in request_ids:
            identity = self._owner.get(request_id)
            if identity is not None:
                self._aborted[request_id] = (identity, deadline)
            self._settle(request_id)
        self._engine.abort(request_ids)

    def _release(self, request_id: str, handoff: dict[str, Any]) -> None:
        from workers import work

        try:
            self._engine.add(work.rejected_handoff(request_id, handoff))
        except Exception as error:  # the wire's edge, as for a request
            logger.warning("%s not released: %s", request_id, type(error).__name__)

    # ------------------------------------------------------------------ what goes out

    def _publish(self, report: "StepReport", at_s: float) -> None:
        self._load = report.load
        by_peer: dict[bytes, list[wire.Delta]] = {}
        for delta in report.deltas:
            identity = self._owner.get(delta.request_id) or self._late(delta)
            if identity is not None:
                by_peer.setdefault(identity, []).append(delta)
            if delta.finish_reason is not None:
                self._settle(delta.request_id)
        for identity, deltas in by_peer.items():
            self._send(identity, wire.Step(deltas))
        self._note_quiet()
        for change in report.changes:
            self._tell_blocks(change, at_s)

    def _late(self, delta: wire.Delta) -> bytes | None:
        """Whom to give the handoff of a prefill that had finished when its abort came: its
        ingress releases the blocks, which nobody would read."""
        if delta.handoff is None:
            return None
        return self._aborted.pop(delta.request_id, (None, 0.0))[0]

    def _tell_blocks(self, change: "Change", at_s: float) -> None:
        for identity, peer in list(self._peers.items()):
            if peer.following:
                peer.sequence += 1
                blocks = wire.Blocks(
                    peer.sequence, change.stored, change.removed, at_s=at_s, tier=change.tier
                )
                self._send(identity, blocks)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            if self._engine.failure is not None:
                raise EngineDeadError(self._replica.name, repr(self._engine.failure))
            now = time.monotonic()
            self._notice_lapse(now)
            self._drop_silent(now)
            self._aborted = {k: v for k, v in self._aborted.items() if v[1] > now}
            if self._engine.stalled_s() < _STALL_S:  # else fall silent: others must take over
                self._send_load(now)

    def _send_load(self, now: float) -> None:
        load = self._current_load()
        last, sent_at = self._load_sent
        if load != last or now - sent_at >= _LOAD_EVERY_S:
            self._load_sent = (load, now)
            for identity in list(self._peers):
                self._send(identity, load)

    def load(self) -> wire.Load:
        """The engine's, as of its last step; for another thread, too."""
        return self._load

    def _current_load(self) -> wire.Load:
        return msgspec.structs.replace(self._load, lanes=self._lanes, draining=self._draining)

    def _send(self, identity: bytes, message: wire.Reply) -> None:
        try:
            future = self._socket.send_multipart([identity, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._drop(identity, f"cannot be reached: {error}")
            return
        sending = cast("asyncio.Future[Any]", future)
        if sending.done():
            self._sent(identity, sending)
        else:
            sending.add_done_callback(lambda done: self._sent(identity, done))

    def _sent(self, identity: bytes, done: "asyncio.Future[Any]") -> None:
        if not done.cancelled() and done.exception() is not None:
            self._drop(identity, f"cannot be reached: {done.exception()}")

    def _drop_silent(self, now: float) -> None:
        for identity, peer in list(self._peers.items()):
            if now - peer.heard_at > SILENCE_S:
                self._drop(identity, f"silent for {now - peer.heard_at:.0f} s")

    def _drop(self, identity: bytes, why: str) -> None:
        peer = self._peers.pop(identity, None)
        if peer is None:
            return
        logger.warning(
            "ingress %s dropped with %d requests: %s", peer.ingress, len(peer.requests), why
        )
        for request_id in peer.requests:
            self._owner.pop(request_id, None)
        if peer.requests:
            self._engine.abort(list(peer.requests))
        self._note_quiet()

    def _settle(self, request_id: str) -> None:
        """A request is over: nobody owns it any more."""
        identity = self._owner.pop(request_id, None)
        peer = self._peers.get(identity) if identity is not None else None
        if peer is not None:
            peer.requests.discard(request_id)
        self._note_quiet()
