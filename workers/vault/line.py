"""A client's connection to one shard, for any thread; every call ends by its deadline.

A shard that does not answer in time, or whose bytes do not arrive, costs the connection: whether
its messages or bytes are still under way cannot be known, so the socket, the NIXL agent and the
memory that it may still write go together, and a thread connects anew after a pause. Until then
every call fails at once. No call waits for a connection.
"""

import itertools
import logging
import os
import socket as hosts
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import zmq

from kv.errors import VaultLostError, VaultMessageError
from kv.vault import wire
from workers import curve
from workers.vault.region import Piece, Region

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
# Between a loss and the next try: doubled from the first to the second until a call succeeds. A
# shard may welcome whoever comes and hang all the same, for instance with its disk.
RETRY_S, RETRY_MOST_S = 0.5, 30.0
_LOOK_S = 0.1
_FATAL = zmq.Event.DISCONNECTED | zmq.Event.CLOSED | zmq.Event.CONNECT_RETRIED


_Numbered = wire.Put | wire.Written | wire.Get | wire.Has | wire.Forget | wire.Stat
_Reply = TypeVar(
    "_Reply",
    wire.Welcome,
    wire.Granted,
    wire.Stored,
    wire.Lent,
    wire.Held,
    wire.Forgotten,
    wire.Stats,
)


class Session:
    """One connection that was welcomed; without staging it can ask, and move nothing. Not for
    several threads at once."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        keys: curve.ClientKeys,
        fingerprint: str,
        staging_bytes: int,
    ) -> None:
        """Raises VaultLostError where the shard does not welcome us within CONNECT_S."""
        self._address = address
        self._numbers = itertools.count()
        self._early: dict[tuple[type[wire.Reply], int], wire.Reply] = {}
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A new connection would be another client to the shard.
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        curve.unlock(self._socket, keys)
        self._monitor = self._socket.get_monitor_socket(_FATAL)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self.region: Region | None = None
        try:
            self._socket.connect(address)
            welcome = self._greet(fingerprint)
            if staging_bytes:
                self.region = Region(staging_bytes, serves=False)
                self._peer = self.region.meet(welcome.metadata)
        except BaseException:
            self.close()
            raise
        self._base = welcome.base

    @property
    def staging(self) -> memoryview:
        """Memory to write from and to read into."""
        assert self.region is not None
        return self.region.memory

    def number(self) -> int:
        """For the next question; never given twice."""
        return next(self._numbers)

    def tell(self, question: wire.Question) -> None:
        """Send a message. Raises VaultLostError where there is no connection."""
        try:
            self._socket.send(wire.encode(question), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise self._lost(f"not sent: {error}") from error

    def answer(self, kind: type[_Reply], number: int, deadline_s: float) -> _Reply:
        """The reply of this kind to what was told under this number, whatever comes before it.
        Raises VaultLostError where none comes in time, or never will."""
        while (kind, number) not in self._early:
            reply = self._receive(deadline_s)
            self._early[type(reply), getattr(reply, "number", 0)] = reply
        return cast(_Reply, self._early.pop((kind, number)))

    def ask(self, question: _Numbered, kind: type[_Reply], deadline_s: float) -> _Reply:
        """Tell, and its answer."""
        self.tell(question)
        return self.answer(kind, question.number, deadline_s)

    def move(
        self,
        direction: str,
        parts: Sequence[tuple[int, Sequence[tuple[int, int]]]],
        deadline_s: float,
    ) -> None:
        """Move frames between staging and the shard as one job: where each begins here, and its
        extents there. Raises VaultLostError where that does not end in time."""
        pieces = []
        for offset, extents in parts:
            for at, n_bytes in extents:
                pieces.append(Piece(offset, self._base + at, n_bytes))
                offset += n_bytes
        assert self.region is not None
        self.region.move(direction, self._peer, pieces, lambda: self._ended(deadline_s))

    def close(self) -> None:
        """The agent first: a shard takes the end of the connection for the end of our writes."""
        if self.region is not None:
            self.region.close()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _greet(self, fingerprint: str) -> wire.Welcome:
        client = f"{hosts.gethostname()}/{os.getpid()}"
        hello = wire.Hello(wire.VAULT_VERSION, client, fingerprint)
        self.tell(hello)
        return self.answer(wire.Welcome, 0, time.monotonic() + CONNECT_S)

    def _receive(self, deadline_s: float) -> wire.Reply:
        left_ms = max(0, round(1000 * (deadline_s - time.monotonic())))
        ready = dict(self._poller.poll(left_ms))
        # What came before the end is read before it.
        if self._socket in ready:
            try:
                reply = wire.decode_reply(self._socket.recv(), self._address)
            except VaultMessageError as error:
                raise self._lost(str(error)) from error
            if isinstance(reply, wire.Denied):
                raise self._lost(f"denied: {reply.complaint}")
            return reply
        raise self._lost("connection ended" if ready else "no answer in time")

    def _ended(self, deadline_s: float) -> bool:
        return time.monotonic() >= deadline_s or bool(self._monitor.poll(0))

    def _lost(self, complaint: str) -> VaultLostError:
        return VaultLostError(f"vault shard at {self._address}", complaint, "look at its log")


class Line:
    """See the module. `connect` makes a session; `name` is for the log."""

    def __init__(self, name: str, connect: Callable[[], Session]) -> None:
        self._name, self._connect = name, connect
        self._lock = threading.Lock()  # held while a call uses the session
        self._state = threading.Condition()
        self._session: Session | None = None
        self._connecting = self._closed = False
        self._again_s, self._retry_s = 0.0, RETRY_S
        self._start()

    def await_up(self, deadline_s: float) -> bool:
        """Whether there is a connection by then."""
        while (left_s := deadline_s - time.monotonic()) > 0.0 and self._session is None:
            self._start()
            with self._state:
                self._state.wait_for(lambda: self._session is not None, min(left_s, _LOOK_S))
        return self._session is not None

    @contextmanager
    def session(self, deadline_s: float) -> Iterator[Session]:
        """The connection, for one call at a time; whatever is raised inside costs it.

        Raises VaultLostError at once where there is none, and at the deadline where other calls
        use it until then.
        """
        wait_s = max(0.0, deadline_s - time.monotonic())
        if not self._lock.acquire(timeout=wait_s):
            raise VaultLostError(f"vault {self._name}", f"busy for {wait_s:.3f} s", "try again")
        try:
            session = self._session
            if session is None:
                self._start()
                raise VaultLostError(f"vault {self._name}", "not connected", "wait")
            try:
                yield session
            except BaseException as error:
                # Of a caller's too: it may have left something under way.
                self._lose(session, error)
                raise
            self._retry_s = RETRY_S
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the connection, once no call uses it."""
        with self._lock, self._state:
            self._closed, session, self._session = True, self._session, None
        if session is not None:
            session.close()

    def _lose(self, session: Session, error: BaseException) -> None:
        logger.warning("%s; the next try in %.1f s", error, self._retry_s)
        with self._state:
            self._session = None
            self._pause()
        # Ending what is under way may take as long as the network does.
        in_background("vault-close", session.close)

    def _pause(self) -> None:
        self._again_s = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_MOST_S)

    def _start(self) -> None:
        with self._state:
            early = time.monotonic() < self._again_s
            if self._connecting or self._closed or early or self._session is not None:
                return
            self._connecting = True
        in_background("vault-connect", self._reach)

    def _reach(self) -> None:
        session = None
        try:
            session = self._connect()
        except Exception as error:  # the thread's edge; NIXL may refuse to make an agent too
            logger.warning("%s; the next try in %.1f s", error, self._retry_s)
        finally:
            self._reached(session)

    def _reached(self, session: Session | None) -> None:
        with self._state:
            self._connecting = False
            if session is None:
                self._pause()
            unwanted = session if self._closed else None
            self._session = None if self._closed else session
            self._state.notify_all()
        if unwanted is not None:
            unwanted.close()


def in_background(name: str, job: Callable[[], Any]) -> None:
    """Run a job on a thread that keeps no process alive."""

    def run() -> None:
        # Nothing of it may end the engine's process.
        with suppress(zmq.ZMQError):
            job()

    threading.Thread(target=run, name=name, daemon=True).start()
