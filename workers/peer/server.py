"""A replica's end of its peers' connections: it lends blocks of its host tier.

On a thread of its own with an event loop of its own: the engine's thread may be in a step that
takes as long as a fetch is worth. At rest nothing here wakes up but NIXL's own thread.
"""

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Protocol, cast

import zmq
import zmq.asyncio
from xxhash import xxh3_64_intdigest

from kv.loan import Loan
from workers import curve
from workers.errors import WireError
from workers.peer import wire
from workers.peer.window import Window

logger = logging.getLogger(__name__)

# However long a reader asks for.
MOST_LEASE_S = 30.0
_BACKLOG = 10_000
# Readers ask for what a request computes until it has ended, and for a moment longer.
_MOST_WORKS = 10_000


class Lender(Protocol):
    """Whose blocks are lent: `kv.offload_host.HostTier`."""

    def here(self, keys: Sequence[bytes]) -> tuple[bool, ...]: ...

    def lend(self, keys: Sequence[bytes]) -> Loan: ...

    def give_back(self, loan: Loan) -> None: ...


class PeerServer:
    """Serves from the moment it is made until `close`. `memory` is (rows, row bytes).

    A reader that dies leaves its loans until their time is over. One whose lease ended before it
    had read finds by the checksum that a row is no longer what it was.
    """

    def __init__(
        self,
        host: str,
        keys: curve.ServerKeys,
        fingerprint: str,
        lender: Lender,
        memory: memoryview,
    ) -> None:
        self._keys, self._fingerprint, self._lender, self._memory = (
            keys,
            fingerprint,
            lender,
            memory,
        )
        self._window = Window(memory, serves=True)
        assert memory.shape is not None
        rows, row_bytes = memory.shape
        self._welcome = wire.Welcome(self._window.metadata, self._window.base, row_bytes, rows)
        self._loans: dict[tuple[bytes, int], tuple[Loan, asyncio.TimerHandle]] = {}
        self.lent_bytes = 0
        # Requests that have ended, the oldest first.
        self._works: dict[str, None] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._configure()
        self.address = curve.bind(self._socket, host)
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="peer-lend", daemon=True)
        self._admitting = threading.Event()
        self._thread.start()
        self._admitting.wait()

    @property
    def loans(self) -> int:
        """Loans that stand."""
        return len(self._loans)

    def close(self) -> None:
        """End all loans and let go of the memory; safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()

    def end(self, work: str) -> None:
        """A request has ended, and all that it computed is in the host tier. On one thread."""
        self._works[work] = None
        if len(self._works) > _MOST_WORKS:
            self._works.pop(next(iter(self._works)))

    # ------------------------------------------------------------------ the server's thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception:  # the thread's edge: peers find nobody, and this engine goes on
            logger.exception("blocks are lent no more")
        finally:
            self._admitting.set()
            self._context.destroy(linger=0)
            for who in list(self._loans):
                self._end(*who)
            self._window.close()
            self._loop.close()

    async def _serve(self) -> None:
        tasks = [
            asyncio.create_task(curve.admit(self._context, self._keys)),
            asyncio.create_task(self._receive()),
            asyncio.create_task(self._ended.wait()),
        ]
        await asyncio.sleep(0)
        self._admitting.set()
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for task in done:
            task.result()

    def _configure(self) -> None:
        self._socket.setsockopt(zmq.SNDHWM, _BACKLOG)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MOST_MESSAGE_BYTES)
        # Sending to a connection that has ended is an error, not silence.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        curve.lock(self._socket, self._keys)

    async def _receive(self) -> None:
        while True:
            reader, *frames = await self._socket.recv_multipart()
            try:
                question = wire.decode_question(b"".join(frames), reader.hex())
            except WireError as error:
                logger.warning("message dropped: %s", error)
                continue
            self._answer(reader, question)
            # Messages that are there already do not give the loop a turn.
            await asyncio.sleep(0)

    def _answer(self, reader: bytes, question: wire.Question) -> None:
        match question:
            case wire.Hello():
                complaint = self._complaint(question)
                self._send(reader, wire.Denied(complaint) if complaint else self._welcome)
            case wire.Find():
                self._find(reader, question)
            case wire.Get():
                self._lend(reader, question)
            case wire.Done(number=number):
                self._end(reader, number)

    def _find(self, reader: bytes, find: wire.Find) -> None:
        # First: what is not there after the end never will be.
        ended = find.work in self._works
        here = self._lender.here(find.keys[: wire.MOST_KEYS])
        self._send(reader, wire.Found(find.number, here, ended))

    def _complaint(self, hello: wire.Hello) -> str:
        if hello.version != wire.PEER_VERSION:
            return f"version {hello.version}, this replica speaks {wire.PEER_VERSION}"
        if hello.fingerprint != self._fingerprint:
            return f"blocks of {hello.fingerprint}, this replica has those of {self._fingerprint}"
        return ""

    def _lend(self, reader: bytes, get: wire.Get) -> None:
        self._end(reader, get.number)
        loan = self._lender.lend(get.keys[: wire.MOST_KEYS])
        lease_s = min(max(0.0, get.lease_s), MOST_LEASE_S)
        timer = self._loop.call_later(lease_s, self._end, reader, get.number)
        self._loans[reader, get.number] = loan, timer
        places = tuple(None if row is None else self._place(row) for row in loan.rows)
        self.lent_bytes += len(loan.chunks) * self._welcome.row_bytes
        if not self._send(reader, wire.Lent(get.number, places)):
            self._end(reader, get.number)

    def _place(self, row: int) -> wire.Place:
        return wire.Place(row, xxh3_64_intdigest(self._memory[row : row + 1].cast("B")))

    def _end(self, reader: bytes, number: int) -> None:
        loan, timer = self._loans.pop((reader, number), (None, None))
        if loan is not None and timer is not None:
            timer.cancel()
            self._lender.give_back(loan)

    def _send(self, reader: bytes, message: wire.Reply) -> bool:
        # NOBLOCK: it is sent, or has failed, when this returns.
        parts = [reader, wire.encode(message)]
        sending = cast("asyncio.Future[object]", self._socket.send_multipart(parts, zmq.NOBLOCK))
        error = sending.exception() if sending.done() else None
        if error is not None:
            logger.info("reader %s: reply lost: %s", reader.hex(), error)
        return error is None
