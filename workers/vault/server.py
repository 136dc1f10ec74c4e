"""A shard's end of its connections: ZMQ ROUTER in front of its books, its memory and its disk."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import cast

import zmq
import zmq.asyncio

from kv.errors import VaultMessageError
from kv.vault import wire
from kv.vault.shard import Delivery, Shard
from workers import curve
from workers.vault.disk import Disk
from workers.vault.region import Region

logger = logging.getLogger(__name__)

TICK_S = 0.5
# Connections that hold nothing are looked at once in so many ticks.
_IDLE_TICKS = 60
_BACKLOG = 10_000
# A peer that vanished without a word, its network with it, is noticed after about 25 s.
_KEEPALIVE = {zmq.TCP_KEEPALIVE_IDLE: 10, zmq.TCP_KEEPALIVE_INTVL: 5, zmq.TCP_KEEPALIVE_CNT: 3}


class ShardServer:
    """Answers clients until cancelled. `wall` gives seconds since 1970.

    A connection is a client: its routing id is drawn for each one and never given twice. Whether
    it stands is seen by sending to it, since a client that is only stopped may still write.
    """

    def __init__(
        self,
        host: str,
        keys: curve.ServerKeys,
        name: str,
        fingerprint: str,
        region: Region,
        shard: Shard,
        disk: Disk | None = None,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._keys, self._fingerprint = keys, fingerprint
        self._shard, self._disk, self._now, self._wall = shard, disk, now, wall
        size_bytes = len(region.memory)
        self._welcome = wire.Welcome(name, region.metadata, region.base, size_bytes)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._configure()
        self.address = curve.bind(self._socket, host)
        self._clients: set[bytes] = set()

    async def serve(self) -> None:
        """Until cancelled. Raises what broke the books, if anything does."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(curve.admit(self._context, self._keys))
                tasks.create_task(self._receive())
                tasks.create_task(self._tick())
        finally:
            self._context.destroy(linger=0)

    def _configure(self) -> None:
        self._socket.setsockopt(zmq.SNDHWM, _BACKLOG)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MOST_MESSAGE_BYTES)
        # Sending to a connection that has ended is an error, not silence.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            self._socket.setsockopt(option, value)
        curve.lock(self._socket, self._keys)

    async def _receive(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                question = wire.decode_question(b"".join(frames), identity.hex())
            except VaultMessageError as error:
                logger.warning("message dropped: %s", error)
                continue
            if isinstance(question, wire.Hello):
                self._greet(identity, question)
            elif identity in self._clients:
                self._handle(identity, question)
                self._obey()
            else:
                self._send(identity, wire.Denied("no hello came before"))
            # Messages that are there already do not give the loop a turn.
            await asyncio.sleep(0)

    def _greet(self, identity: bytes, hello: wire.Hello) -> None:
        if hello.version != wire.VAULT_VERSION:
            ours = f"version {hello.version}, this shard speaks {wire.VAULT_VERSION}"
            self._send(identity, wire.Denied(ours))
        elif hello.fingerprint != self._fingerprint:
            other = f"blocks of {hello.fingerprint}, this shard has those of {self._fingerprint}"
            self._send(identity, wire.Denied(other))
        else:
            self._clients.add(identity)
            logger.info("client %s is %s", identity.hex(), hello.client)
            self._send(identity, self._welcome)

    def _handle(self, identity: bytes, question: wire.Question) -> None:
        client, now_s = identity.hex(), self._now()
        match question:
            case wire.Put():
                self._send(identity, self._shard.grant(client, question, now_s))
            case wire.Written():
                delivery = self._shard.written(client, question, now_s)
                self._store(identity, delivery)
            case wire.Get():
                missing = self._shard.lend(client, question, now_s)
                if missing:
                    self._tasks.create_task(self._load(identity, question, missing))
                else:
                    self._send(identity, self._shard.lent(client, question, now_s))
            case wire.Has():
                self._send(identity, self._shard.held(question, now_s))
            case wire.Done():
                for key in self._shard.done(client, question, now_s):
                    logger.warning("block %s was damaged in memory; dropped", key.hex())
            case wire.Forget():
                self._tasks.create_task(self._forget(identity, question))
            case wire.Stat(number=number):
                self._send(identity, self._shard.stats(number))

    def _store(self, identity: bytes, delivery: Delivery) -> None:
        if self._disk is None:
            self._send(identity, self._shard.acknowledge(delivery, None, self._now()))
        else:
            self._tasks.create_task(self._persist(identity, delivery, self._disk))

    async def _persist(self, identity: bytes, delivery: Delivery, disk: Disk) -> None:
        self._obey()
        frames = self._shard.frames(delivery, self._wall())
        durable = await disk.persist(frames) if frames else frozenset()
        self._send(identity, self._shard.acknowledge(delivery, durable, self._now()))
        self._obey()

    async def _load(self, identity: bytes, get: wire.Get, missing: tuple[bytes, ...]) -> None:
        client = identity.hex()
        for key in missing:
            frame = None if self._disk is None else await self._disk.read(key)
            if not self._shard.admit(client, get.number, key, frame, self._now()):
                break
        self._send(identity, self._shard.lent(client, get, self._now()))
        self._obey()

    async def _forget(self, identity: bytes, forget: wire.Forget) -> None:
        blocks, in_use_bytes = self._shard.forget(forget.tags, self._now())
        erased = self._disk is None or await self._disk.erase(frozenset(forget.tags))
        logger.info("%d blocks of %d tenants forgotten", blocks, len(forget.tags))
        self._send(identity, wire.Forgotten(forget.number, blocks, in_use_bytes, erased))

    def _obey(self) -> None:
        """What the books have removed goes from the disk, before anything is written there."""
        deleted = self._shard.deleted()
        if deleted and self._disk is not None:
            self._disk.delete(deleted)

    async def _tick(self) -> None:
        tick = 0
        while True:
            await asyncio.sleep(TICK_S)
            tick += 1
            self._shard.advance(self._now())
            for identity in list(self._clients):
                if tick % _IDLE_TICKS == 0 or self._shard.holds(identity.hex()):
                    self._send(identity, wire.Beat())
            self._obey()

    def _send(self, identity: bytes, message: wire.Reply) -> None:
        # NOBLOCK: it is sent, or has failed, when this returns.
        parts = [identity, wire.encode(message)]
        sending = cast("asyncio.Future[object]", self._socket.send_multipart(parts, zmq.NOBLOCK))
        error = sending.exception() if sending.done() else None
        if isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
            self._clients.discard(identity)
            self._shard.gone(identity.hex(), self._now())
        elif error is not None:
            # It does not read: it gives up by itself when its deadline comes.
            logger.warning("client %s: reply lost: %s", identity.hex(), error)
