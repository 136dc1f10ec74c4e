"""A reader's connection to one lender. Every call ends by its deadline.

Whatever goes wrong costs the connection: messages or bytes may still be under way, so the socket
and the NIXL agent go together. Until they are closed bytes may still come into rows that were read
to.
"""

import itertools
import time
from collections.abc import Sequence
from typing import TypeVar, cast

import zmq

from kv.errors import VaultLostError
from workers import curve
from workers.errors import PeerLostError, WireError
from workers.peer import wire
from workers.peer.window import Window
from workers.vault.region import READ, Piece

# Bytes of one NIXL job: large enough for its speed, and while one moves the last is verified.
JOB_BYTES = 4 << 20
_FATAL = zmq.Event.DISCONNECTED | zmq.Event.CLOSED | zmq.Event.CONNECT_RETRIED
_Reply = TypeVar("_Reply", wire.Welcome, wire.Found, wire.Lent)


class Session:
    """One connection that was welcomed. Not for several threads at once."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        keys: curve.ClientKeys,
        fingerprint: str,
        memory: memoryview,
        deadline_s: float,
    ) -> None:
        """`memory`, of (rows, row bytes), is where blocks are read to. Raises PeerLostError where
        the lender does not welcome us by the deadline."""
        assert memory.shape is not None
        self.address, self.row_bytes = address, memory.shape[1]
        self.job_rows = min(wire.MOST_KEYS, max(1, JOB_BYTES // self.row_bytes))
        self._numbers = itertools.count()
        self._early: dict[tuple[type[wire.Reply], int], wire.Reply] = {}
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # What was lent to this connection is not lent to another.
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MOST_MESSAGE_BYTES)
        curve.unlock(self._socket, keys)
        self._monitor = self._socket.get_monitor_socket(_FATAL)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._window: Window | None = None
        try:
            self._socket.connect(address)
            self._meet(fingerprint, memory, deadline_s)
        except zmq.ZMQError as error:
            self.close()
            raise self._lost(str(error)) from error
        except BaseException:
            self.close()
            raise

    def number(self) -> int:
        """For the next question; never given twice."""
        return next(self._numbers)

    def tell(self, question: wire.Question) -> None:
        """Send a message. Raises PeerLostError where there is no connection."""
        try:
            self._socket.send(wire.encode(question), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise self._lost(f"not sent: {error}") from error

    def answer(self, kind: type[_Reply], number: int, deadline_s: float) -> _Reply:
        """The reply of this kind to what was told under this number, whatever comes before it.
        Raises PeerLostError where none comes in time, or never will."""
        while (kind, number) not in self._early:
            reply = self._receive(deadline_s)
            self._early[type(reply), getattr(reply, "number", 0)] = reply
        return cast(_Reply, self._early.pop((kind, number)))

    def read(self, rows: Sequence[tuple[int, int]], deadline_s: float) -> None:
        """Read rows as one job: which of ours each comes to, and which of the lender's it is.
        Raises PeerLostError where that does not end in time."""
        assert self._window is not None
        pieces = [
            Piece(here * self.row_bytes, self._base + there * self.row_bytes, self.row_bytes)
            for here, there in rows
        ]
        try:
            self._window.move(READ, self._peer, pieces, lambda: self._ended(deadline_s))
        except VaultLostError as error:
            raise self._lost(str(error.args[1])) from error

    def close(self) -> None:
        """Safe to call twice. Afterwards nothing comes into any row."""
        if self._window is not None:
            self._window.close()
            self._window = None
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)

    def _meet(self, fingerprint: str, memory: memoryview, deadline_s: float) -> None:
        self.tell(wire.Hello(wire.PEER_VERSION, fingerprint))
        welcome = self.answer(wire.Welcome, 0, deadline_s)
        if welcome.row_bytes != self.row_bytes:
            raise self._lost(f"rows of {welcome.row_bytes} bytes, ours have {self.row_bytes}")
        try:
            self._window = Window(memory, serves=False)
            self._peer = self._window.meet(welcome.metadata)
        except VaultLostError as error:
            raise self._lost(str(error.args[1])) from error
        self._base = welcome.base

    def _receive(self, deadline_s: float) -> wire.Reply:
        left_ms = max(0, round(1000 * (deadline_s - time.monotonic())))
        ready = dict(self._poller.poll(left_ms))
        # What came before the end is read before it.
        if self._socket in ready:
            try:
                reply = wire.decode_reply(self._socket.recv(), self.address)
            except WireError as error:
                raise self._lost(str(error)) from error
            if isinstance(reply, wire.Denied):
                raise self._lost(f"denied: {reply.complaint}")
            return reply
        raise self._lost("connection ended" if ready else "no answer in time")

    def _ended(self, deadline_s: float) -> bool:
        return time.monotonic() >= deadline_s or bool(self._monitor.poll(0))

    def _lost(self, complaint: str) -> PeerLostError:
        return PeerLostError(self.address, complaint)
