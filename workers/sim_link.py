"""The simulator's end of a link: frames that arrive in order, a moment after they were sent."""

import asyncio
from collections import deque
from collections.abc import Callable

from workers import messages as wire

HELLO_EVERY_S = 1.0
# Long enough that messages cross each other, short against a decode step.
WIRE_S = 0.0001


class _Wire:
    """One direction. In order even though the loop may swap timers that are due together."""

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        self._deliver = deliver
        self._frames: deque[bytes] = deque()

    def put(self, frame: bytes) -> None:
        self._frames.append(frame)
        asyncio.get_running_loop().call_later(WIRE_S, self._next)

    def _next(self) -> None:
        self._deliver(self._frames.popleft())


class SimLink:
    """A `Link` to a simulated engine; `hear` is what the engine does with a message."""

    def __init__(
        self, hello: wire.Hello, inbox: wire.Inbox, hear: Callable[["SimLink", wire.Request], None]
    ) -> None:
        self._hello, self._inbox, self._hear = hello, inbox, hear
        self._closed = False
        self._up = _Wire(self._arrive)
        self._down = _Wire(self._answer)
        self._greet()

    def send(self, request: wire.Request) -> None:
        """Queue a message; what is sent to a crashed engine is lost."""
        if not self._closed:
            self._up.put(wire.encode(request))

    def tell(self, reply: wire.Reply) -> None:
        """A message from the engine."""
        self._down.put(wire.encode(reply))

    def close(self) -> None:
        """Drop the connection; the engine notices by silence."""
        self._closed = True
        self._greeting.cancel()

    def _greet(self) -> None:
        self.send(self._hello)
        self._greeting = asyncio.get_running_loop().call_later(HELLO_EVERY_S, self._greet)

    def _arrive(self, frame: bytes) -> None:
        self._hear(self, wire.decode_request(frame, self._hello.ingress))

    def _answer(self, frame: bytes) -> None:
        if not self._closed:
            self._inbox.receive(wire.decode_reply(frame, "simulated engine"))
