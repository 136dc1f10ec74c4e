"""A catalogue's end of its lines: ZMQ ROUTER in front of the holdings and the accounts."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import cast

import zmq
import zmq.asyncio

from kv.block import split_keys
from router.catalogue import wire
from router.catalogue.accounts import Accounts
from router.catalogue.holdings import Holdings
from workers import curve
from workers.errors import WireError

logger = logging.getLogger(__name__)

# An ingress says Hello every second; what one expects that says nothing is dropped after this.
SILENCE_S = 3.0
BEAT_S = 0.25
_BACKLOG = 10_000


class CatalogueServer:
    """Answers ingresses until cancelled. `beat` gives what each beat says."""

    def __init__(
        self,
        host: str,
        keys: curve.ServerKeys,
        holdings: Holdings,
        beat: Callable[[], wire.Beat],
        now: Callable[[], float],
    ) -> None:
        self._holdings, self._beat, self._now = holdings, beat, now
        self._accounts, self._keys = Accounts(now), keys
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, _BACKLOG)
        self._socket.setsockopt(zmq.LINGER, 0)
        curve.lock(self._socket, keys)
        self.address = curve.bind(self._socket, host)
        self._heard: dict[bytes, float] = {}
        self._last = beat()

    async def serve(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(curve.admit(self._context, self._keys))
                tasks.create_task(self._receive())
                tasks.create_task(self._beats())
        finally:
            self._context.destroy(linger=0)

    def last(self) -> wire.Beat:
        """The beat that was sent last."""
        return self._last

    def ingresses(self) -> Mapping[bytes, float]:
        """Who is connected, and when each was heard last."""
        return self._heard

    async def _receive(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                question = wire.decode_question(b"".join(frames), identity.hex())
            except WireError as error:
                logger.warning("message dropped: %s", error)
                continue
            if identity not in self._heard:
                self._send(identity, wire.Tell())
                self._send(identity, self._last)
            self._heard[identity] = self._now()
            self._handle(identity, question)
            # Messages that are there already do not give the loop a turn.
            await asyncio.sleep(0)

    def _handle(self, identity: bytes, question: wire.Question) -> None:
        match question:
            case wire.Hello():
                pass  # that it was heard is all
            case wire.Look(number=number, keys=keys):
                split = split_keys(keys)
                found = self._holdings.look(identity.hex(), split)
                self._send(identity, wire.Answer(number, found))
                self._holdings.asked(split, found)  # nobody waits for that
            case wire.Expect():
                self._holdings.expect(identity.hex(), question)
            case wire.Met(name=name):
                self._holdings.met(identity.hex(), name)
            case wire.Enter(number=number):
                standing = self._accounts.enter(identity.hex(), question)
                self._send(identity, wire.Stands(number, standing))
            case wire.Held():
                self._accounts.held(identity.hex(), question)
            case wire.Leave():
                self._accounts.leave(identity.hex(), question)

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._drop_silent()
            self._last = self._beat()
            for identity in self._heard:
                self._send(identity, self._last)

    def _drop_silent(self) -> None:
        for identity, heard_at in list(self._heard.items()):
            if self._now() - heard_at > SILENCE_S:
                del self._heard[identity]
                self._holdings.leave(identity.hex())
                self._accounts.lose(identity.hex())

    def _send(self, identity: bytes, message: wire.Reply) -> None:
        sending = self._socket.send_multipart([identity, wire.encode(message)], zmq.NOBLOCK)
        cast("asyncio.Future[object]", sending).add_done_callback(_unread)


def _unread(sending: "asyncio.Future[object]") -> None:
    # A full queue is an ingress that does not read: it plans without us and is told again.
    if not sending.cancelled():
        sending.exception()
