"""An ingress's line to the catalogue of its node."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

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
# One that is announced and silent for so long is connected to anew.
CONNECT_AGAIN_S = 10.0
_HELLO_EVERY_S = 1.0
_DIRECTORY_EVERY_S = 1.0
_BACKLOG = 100_000


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
        self._heard_at = self._entered_at = -SILENCE_S
        self.beat = wire.Beat()

    @property
    def up(self) -> bool:
        """Whether the catalogue answers."""
        return self._socket is not None and self._now() - self._heard_at <= SILENCE_S

    async def watch(self) -> None:
        """Until cancelled: find the catalogue, greet it, follow it when it moves."""
        try:
            async with asyncio.TaskGroup() as tasks:
                # Apart: a directory that hangs must not silence the line.
                tasks.create_task(self._follow_seats())
                while True:
                    self._greet()
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
        """Send a message; lost while there is no catalogue, which is told anew what stands."""
        if self._socket is not None:
            future = self._socket.send(wire.encode(message), zmq.NOBLOCK)
            sending = cast("asyncio.Future[object]", future)
            sending.add_done_callback(partial(self._sent, self._socket))

    def _sent(self, socket: zmq.asyncio.Socket, sending: "asyncio.Future[object]") -> None:
        lost = not sending.cancelled() and sending.exception() is not None
        if lost and socket is self._socket:
            # It reads nothing; when it does again it must not go by half of what was said.
            logger.warning("catalogue: message lost: %s", sending.exception())
            self._reconnect()

    def stands(self, name: str, message: wire.Question | None) -> None:
        """What a new catalogue is to be told under this name, until it is None."""
        if message is None:
            self._standing.pop(name, None)
        else:
            self._standing[name] = message

    async def _follow_seats(self) -> None:
        while True:
            try:
                seat = self._choose(await self._seats.catalogues())
            except OSError as error:
                logger.warning("directory not reached: %s", error)
            else:
                if seat != self._seat:
                    self._leave()
                    self._enter(seat)
            await asyncio.sleep(_DIRECTORY_EVERY_S)

    def _choose(self, seats: Sequence[Seat]) -> Seat | None:
        """One that answers is kept, whatever the directory says. Else this node's own, else any,
        and last the one that has fallen silent: a dead one's record outlives it."""
        if self.up:
            return self._seat
        fitting = [seat for seat in seats if seat.version == wire.CATALOGUE_VERSION]
        return min(
            fitting,
            key=lambda s: (s.node != self._node, s == self._silent, s.name, s.epoch),
            default=None,
        )

    @property
    def _silent(self) -> Seat | None:
        """The seat that we are connected to and that has had time to answer."""
        return self._seat if self._now() - self._entered_at > SILENCE_S else None

    def _greet(self) -> None:
        if self._socket is None:
            return
        if self._now() - max(self._heard_at, self._entered_at) > CONNECT_AGAIN_S:
            self._reconnect()
        self.tell(wire.Hello(self._ingress))

    def _reconnect(self) -> None:
        seat = self._seat
        self._leave()
        self._enter(seat)

    def _enter(self, seat: Seat | None) -> None:
        if seat is None:
            return
        self._seat, self._entered_at = seat, self._now()
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, _BACKLOG)
        self._socket.setsockopt(zmq.LINGER, 0)
        curve.unlock(self._socket, self._keys)
        self._socket.connect(seat.address)
        self._receiving = asyncio.create_task(self._receive(self._socket))
        self.tell(wire.Hello(self._ingress))

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
            self._take(reply)

    def _take(self, reply: wire.Reply) -> None:
        match reply:
            case wire.Beat():
                self.beat = reply
            case wire.Tell():
                for message in list(self._standing.values()):
                    self.tell(message)
            case wire.Answer(number=number) | wire.Stands(number=number):
                answer = self._waiting.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(reply)
