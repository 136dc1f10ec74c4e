"""An ingress's line to the catalogue of its node."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq
import zmq.asyncio

from router.catalogue import wire
from router.catalogue.wire import Expect, Found, Seat
from workers import curve
from workers.errors import WireError

logger = logging.getLogger(__name__)

# An answer takes about 0.2 ms; a plan without hits costs more than waiting this long.
ANSWER_S = 0.25
# A catalogue beats four times a second; one that is silent for longer is not asked.
SILENCE_S = 1.5
_HELLO_EVERY_S = 1.0
_DIRECTORY_EVERY_S = 1.0


class Seats(Protocol):
    """Where catalogues announce themselves."""

    async def catalogues(self) -> Sequence[Seat]:
        """Everyone announced now; raises OSError while the directory cannot be reached."""
        ...


class CatalogueLine:
    """A `wire.Line` over ZMQ: to the catalogue of this node, or of another where it has none."""

    def __init__(
        self,
        seats: Seats,
        ingress: str,
        node: str,
        keys: curve.ClientKeys,
        now: Callable[[], float],
    ) -> None:
        self._seats, self._ingress, self._node = seats, ingress, node
        self._keys, self._now = keys, now
        # What a catalogue that is new has to be told.
        self._standing: dict[str, wire.Question] = {}
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[wire.Answer | wire.Stands]] = {}
        self._seat: Seat | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._heard_at = -SILENCE_S
        self.beat = wire.Beat()

    @property
    def up(self) -> bool:
        """Whether the catalogue answers."""
        return self._socket is not None and self._now() - self._heard_at <= SILENCE_S

    async def watch(self) -> None:
        """Until cancelled: find the catalogue, greet it, follow it when it moves."""
        try:
            while True:
                await self._follow()
                if self._socket is not None:
                    self.tell(wire.Hello(self._ingress))
                await asyncio.sleep(_HELLO_EVERY_S)
        finally:
            self._leave()

    async def look(self, keys: bytes) -> Found | None:
        """What is known of these blocks; None when no catalogue answers in time."""
        reply = await self.ask(lambda number: wire.Look(number, keys))
        return reply.found if isinstance(reply, wire.Answer) else None

    def expect(self, expect: Expect) -> None:
        """Tell of a request that was sent; told again to a catalogue that is new."""
        self.tell(expect)
        self.stands(expect.name, expect)

    def met(self, name: str) -> None:
        """Take that back."""
        self.stands(name, None)
        self.tell(wire.Met(name))

    async def ask(
        self, question: Callable[[int], wire.Question]
    ) -> wire.Answer | wire.Stands | None:
        """The reply to a question of a number; None when no catalogue answers in time."""
        if not self.up:
            return None
        number = next(self._numbers)
        reply: asyncio.Future[wire.Answer | wire.Stands]
        self._waiting[number] = reply = asyncio.get_running_loop().create_future()
        self.tell(question(number))
        try:
            async with asyncio.timeout(ANSWER_S):
                return await reply
        except TimeoutError:
            return None
        finally:
            del self._waiting[number]

    def tell(self, message: wire.Question) -> None:
        """Send a message; lost while there is no catalogue."""
        if self._socket is not None:
            try:
                self._socket.send(wire.encode(message), zmq.NOBLOCK)
            except zmq.Again:  # it reads nothing: its silence is noticed
                logger.warning("catalogue: message lost")

    def stands(self, name: str, message: wire.Question | None) -> None:
        """What a new catalogue is to be told under this name, until it is None."""
        if message is None:
            self._standing.pop(name, None)
        else:
            self._standing[name] = message

    async def _follow(self) -> None:
        try:
            seats = await self._seats.catalogues()
        except OSError as error:
            logger.warning("directory not reached: %s", error)
            return
        seat = self._choose(seats)
        if seat != self._seat:
            self._leave()
            if seat is not None:
                self._enter(seat)

    def _choose(self, seats: Sequence[Seat]) -> Seat | None:
        """This node's own, else any: all ingresses of a node choose the same one. One that
        answers is kept."""
        if self.up and self._seat in seats:
            return self._seat
        fitting = [seat for seat in seats if seat.version == wire.CATALOGUE_VERSION]
        return min(fitting, key=lambda s: (s.node != self._node, s.name, s.epoch), default=None)

    def _enter(self, seat: Seat) -> None:
        self._seat = seat
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        curve.unlock(self._socket, self._keys)
        self._socket.connect(seat.address)
        self._receiving = asyncio.create_task(self._receive(self._socket))
        for message in self._standing.values():
            self.tell(message)

    def _leave(self) -> None:
        if self._socket is not None and self._receiving is not None:
            self._receiving.cancel()
            self._socket.close(linger=0)
        self._seat = self._socket = self._receiving = None
        self._heard_at = -SILENCE_S
        self.beat = wire.Beat()

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frame = await socket.recv()
            try:
                reply = wire.decode_reply(frame, "catalogue")
            except WireError as error:
                logger.warning("message dropped: %s", error)
                continue
            self._heard_at = self._now()
            if isinstance(reply, wire.Beat):
                self.beat = reply
                continue
            answer = self._waiting.get(reply.number)
            if answer is not None and not answer.done():
                answer.set_result(reply)
