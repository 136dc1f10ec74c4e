"""An ingress's end of the direct channel: one ZMQ DEALER for each replica.

Tokens take this way instead of a Serve handle, which costs 3 to 5 ms for a first item and about
1 ms of CPU a token (FACTS); here a step's deltas for one ingress are one small message.
"""

import asyncio
import logging
from typing import cast

import zmq
import zmq.asyncio

from workers import curve
from workers import messages as wire
from workers.errors import WireError

logger = logging.getLogger(__name__)

_HELLO_EVERY_S = 1.0
_BACKLOG = 100_000


class ChannelLink:
    """A `Link` over ZMQ. Made on the running event loop; `close` ends its two tasks.

    With `follow` the replica tells its blocks too.
    """

    def __init__(
        self,
        address: str,
        ingress: str,
        inbox: wire.Inbox,
        keys: curve.ClientKeys,
        follow: bool = False,
    ) -> None:
        self._address, self._inbox = address, inbox
        self._hello = wire.Hello(ingress, follow)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, _BACKLOG)
        self._socket.setsockopt(zmq.LINGER, 0)
        curve.unlock(self._socket, keys)
        self._socket.connect(address)
        self._tasks = [asyncio.create_task(self._greet()), asyncio.create_task(self._receive())]

    def send(self, request: wire.Request) -> None:
        """Queue a message; dropped when the link is closed, and with a warning when the replica
        has stopped reading."""
        # pyzmq raises from a socket that has closed while its reader waits to hear of that.
        if self._socket.closed:
            return
        future = self._socket.send(wire.encode(request), zmq.NOBLOCK)
        sending = cast("asyncio.Future[object]", future)
        if sending.done():
            self._sent(sending)
        else:
            sending.add_done_callback(self._sent)

    def close(self) -> None:
        """End the connection; the replica notices by silence and aborts what it ran for us."""
        for task in self._tasks:
            task.cancel()
        self._socket.close(linger=0)

    def _sent(self, sending: "asyncio.Future[object]") -> None:
        if not sending.cancelled() and sending.exception() is not None:
            logger.warning("%s: message lost: %s", self._address, sending.exception())

    async def _greet(self) -> None:
        while True:
            self.send(self._hello)
            await asyncio.sleep(_HELLO_EVERY_S)

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            try:
                self._inbox.receive(wire.decode_reply(frame, self._address))
            except WireError as error:
                logger.warning("message dropped: %s", error)
            # A message that is there already does not give the loop a turn.
            await asyncio.sleep(0)
