"""A reader's connection to one lender. Every call ends by its deadline.

Whatever goes wrong costs the connection: messages or bytes may still be under way, so the socket,
the NIXL agent and the memory that it may still write go together (`workers.vault.region`).
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
from workers.vault.region import READ, Piece, Region

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
        row_bytes: int,
        deadline_s: float,
    ) -> None:
        """Raises PeerLostError where the lender does not welcome us by the deadline."""
        self.address, self.row_bytes = address, row_bytes
        # Rows of one job; staging holds two jobs, one that comes and one that is verified.
        self.job_rows = min(wire.MOST_KEYS, max(1, JOB_BYTES // row_bytes))
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
        self._region: Region | None = None
        try:
            self._socket.connect(address)
            self._meet(fingerprint, deadline_s)
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

    def read(self, half: int, rows: Sequence[int], deadline_s: float) -> list[memoryview]:
        """Read the lender's rows as one job into one half of staging, where they stay until the
        same half is read into again. Raises PeerLostError where that does not end in time."""
        assert self._region is not None
        start = half * self.job_rows * self.row_bytes
        offsets = [start + at * self.row_bytes for at in range(len(rows))]
        pieces = [
            Piece(offset, self._base + row * self.row_bytes, self.row_bytes)
            for offset, row in zip(offsets, rows, strict=True)
        ]
        try:
            self._region.move(READ, self._peer, pieces, lambda: self._ended(deadline_s))
        except VaultLostError as error:
            raise self._lost(str(error.args[1])) from error
        return [self._region.memory[offset : offset + self.row_bytes] for offset in offsets]

    def wipe(self) -> None:
        """Overwrite what was read and is still in staging."""
        if self._region is not None:
            self._region.memory[:] = bytes(len(self._region.memory))

    def close(self) -> None:
        """Safe to call twice."""
        if self._region is not None:
            self._region.close()
            self._region = None
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)

    def _meet(self, fingerprint: str, deadline_s: float) -> None:
        self.tell(wire.Hello(wire.PEER_VERSION, fingerprint))
        welcome = self.answer(wire.Welcome, 0, deadline_s)
        if welcome.row_bytes != self.row_bytes:
            raise self._lost(f"rows of {welcome.row_bytes} bytes, ours have {self.row_bytes}")
        try:
            self._region = Region(2 * self.job_rows * self.row_bytes, serves=False)
            self._peer = self._region.meet(welcome.metadata)
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
