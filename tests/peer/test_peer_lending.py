"""A lender and a reader, over real sockets and NIXL: what comes is what was lent, or nothing."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zmq

from tests.peer.lending_process import FINGERPRINT, SECRET, Rows, key, lender, memory
from tests.waiting import await_that
from workers import curve
from workers.curve import ClientKeys
from workers.errors import PeerLostError
from workers.peer import server as servers
from workers.peer import session as sessions
from workers.peer import wire
from workers.peer.fetch import fetch
from workers.peer.keys import peer_keys
from workers.peer.server import PeerServer
from workers.peer.session import Session

ROWS, ROW_BYTES = 40, 4096
KEYS = peer_keys(SECRET)


@pytest.fixture(scope="module")
def far() -> Iterator[str]:
    """The address of a lender in another process."""
    with lender(ROWS, ROW_BYTES) as (address, _):
        yield address


@pytest.fixture
def near() -> Iterator[tuple[PeerServer, Rows, memoryview]]:
    """A lender here, whose books and rows can be seen."""
    rows, content = Rows(ROWS), memory(ROWS, ROW_BYTES)
    server = PeerServer("127.0.0.1", KEYS.server, FINGERPRINT, rows, content)
    with closing(server):
        yield server, rows, content
    assert rows.out == 0


@contextmanager
def connected(
    address: str,
    keys: ClientKeys = KEYS.client,
    fingerprint: str = FINGERPRINT,
    row_bytes: int = ROW_BYTES,
    within_s: float = 10.0,
) -> Iterator[Session]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    deadline_s = time.monotonic() + within_s
    try:
        here = memoryview(bytearray(2 * ROWS * row_bytes)).cast("B", (2 * ROWS, row_bytes))
        made = Session(context, address, keys, fingerprint, here, deadline_s)
        with closing(made):
            yield made
    finally:
        context.term()


def fetched(session: Session, keys: list[bytes], within_s: float = 5.0) -> dict[int, bytes]:
    """Blocks that came whole, by index."""
    assert session._window is not None
    memory, blocks = session._window.memory, dict[int, bytes]()
    # From the last of our rows to the first.
    rows = [2 * ROWS - 1 - at for at in range(len(keys))]
    wanted = [
        (name, row, memory[row : row + 1].cast("B")) for name, row in zip(keys, rows, strict=True)
    ]

    def land(indices: list[int]) -> None:
        blocks.update({at: bytes(wanted[at][2]) for at in indices})

    with ThreadPoolExecutor(1) as verifying:
        fetch(session, verifying, wanted, land, time.monotonic() + within_s)
    return blocks


@pytest.mark.parametrize("job_rows", [1, 7, 40, 400])
def test_blocks_come_exactly(far: str, monkeypatch: pytest.MonkeyPatch, job_rows: int) -> None:
    """In jobs of any size, in the order that is asked for; what is not there does not come."""
    monkeypatch.setattr(sessions, "JOB_BYTES", job_rows * ROW_BYTES)
    asked = [key(row) for row in reversed(range(ROWS))]
    asked[5] = b"nobody has it"
    with connected(far) as session:
        for _ in range(2):
            blocks = fetched(session, asked)
            assert sorted(blocks) == [at for at in range(ROWS) if at != 5]
            for at, block in blocks.items():
                assert block == bytes([ROWS - at]) * ROW_BYTES


def test_what_is_read_is_given_back_at_once(
    near: tuple[PeerServer, Rows, memoryview],
) -> None:
    """Long before its lease would end."""
    server, rows, _ = near
    with connected(server.address) as session:
        assert len(fetched(session, [key(row) for row in range(ROWS)], within_s=25.0)) == ROWS
        await_that(lambda: rows.out == 0 and server.loans == 0, "given back", 2.0)
        assert server.lent_bytes == ROWS * ROW_BYTES


def test_a_lease_ends_without_its_reader(near: tuple[PeerServer, Rows, memoryview]) -> None:
    """One that asked and went away, or asks for longer than anybody gets."""
    server, rows, _ = near
    with connected(server.address) as session:
        session.tell(wire.Get(0, (key(1), key(2)), 0.2))
        await_that(lambda: rows.out == 2, "lent")
    await_that(lambda: rows.out == 0, "ended", 2.0)


def test_nothing_is_lent_under_one_number_twice(
    near: tuple[PeerServer, Rows, memoryview],
) -> None:
    """A second loan of the number ends the first; to end one that is not there is nothing."""
    server, rows, _ = near
    with connected(server.address) as session:
        for _ in range(2):
            session.tell(wire.Get(7, (key(1), key(2)), 10.0))
            session.answer(wire.Lent, 7, time.monotonic() + 5)
            assert rows.out == 2
        session.tell(wire.Done(7))
        session.tell(wire.Done(7))
        await_that(lambda: rows.out == 0, "given back")


def test_a_reader_hears_when_what_it_waits_for_has_ended(
    near: tuple[PeerServer, Rows, memoryview], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the request that it named alone; and not if it ended while the answer was made, since a
    block may have come just then."""
    server, rows, _ = near
    missing = rows._rows.pop(key(3))

    def found(session: Session, work: str) -> wire.Found:
        number = session.number()
        session.tell(wire.Find(number, (key(2), key(3)), work))
        return session.answer(wire.Found, number, time.monotonic() + 5)

    with connected(server.address) as session:
        server.end("another")
        assert found(session, "work") == wire.Found(0, (True, False))
        here = rows.here

        def ends_meanwhile(keys: Sequence[bytes]) -> tuple[bool, ...]:
            told = here(keys)
            rows._rows[key(3)] = missing
            server.end("work")
            return told

        monkeypatch.setattr(rows, "here", ends_meanwhile)
        assert found(session, "work") == wire.Found(1, (True, False))
        assert found(session, "work") == wire.Found(2, (True, True), ended=True)
        assert found(session, "") == wire.Found(3, (True, True))


def test_the_oldest_ends_are_forgotten(
    near: tuple[PeerServer, Rows, memoryview], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lender's memory does not grow with each request."""
    monkeypatch.setattr(servers, "_MOST_WORKS", 3)
    for number in range(10):
        near[0].end(f"r{number}")
    assert list(near[0]._works) == ["r7", "r8", "r9"]


def test_what_changed_since_its_checksum_does_not_come(
    near: tuple[PeerServer, Rows, memoryview], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that ended too early, or memory that fails."""
    server, _, content = near
    place = server._place

    def changed(row: int) -> wire.Place:
        told = place(row)
        content[row, 9] ^= row == 3
        return told

    monkeypatch.setattr(server, "_place", changed)
    with connected(server.address) as session:
        blocks = fetched(session, [key(row) for row in range(6)])
    assert sorted(blocks) == [0, 1, 2, 4, 5]


def test_only_replicas_of_the_cluster_are_lent_to(far: str) -> None:
    """Not those of another cluster, nor an ingress of this one."""
    for keys in (peer_keys(bytes(32)).client, curve.client_keys(SECRET)):
        with pytest.raises(PeerLostError), connected(far, keys, within_s=0.7):
            pass


def test_other_blocks_are_denied(far: str) -> None:
    """Of another model or layout, and rows of another size: the complaint names both."""
    denied = pytest.raises(PeerLostError, match=f"abc.*{FINGERPRINT}")
    with denied, connected(far, fingerprint="abc"):
        pass
    refused = pytest.raises(PeerLostError, match=f"{ROW_BYTES}.*{2 * ROW_BYTES}")
    with refused, connected(far, row_bytes=2 * ROW_BYTES):
        pass


def _stands(pid: int) -> bool:
    """Whether each thread of a process is stopped or dead."""
    try:
        states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # a thread that has just died
        return False
    return all(state.rpartition(")")[2].split()[0] in "TZX" for state in states)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_fetch_ends_by_its_deadline(number: signal.Signals) -> None:
    """Whatever became of the lender; a dead one is noticed before."""
    with lender(ROWS, ROW_BYTES) as (address, process), connected(address) as session:
        assert len(fetched(session, [key(1)])) == 1
        os.kill(process.pid, number)
        # A thread on another core may answer before the signal reaches it.
        await_that(lambda: _stands(process.pid), "all of the lender's threads stand", 5, 0.005)
        began = time.monotonic()
        with pytest.raises(PeerLostError):
            fetched(session, [key(row) for row in range(ROWS)], within_s=0.5)
        assert time.monotonic() - began < 0.7


def test_noise_ends_nobody(near: tuple[PeerServer, Rows, memoryview]) -> None:
    """Bytes that are no message are dropped, and questions are answered as before."""
    server, _, _ = near
    with connected(server.address) as session:
        session._socket.send(b"\xc1noise")
        session.tell(wire.Find(1, (key(1), b"else")))
        assert session.answer(wire.Found, 1, time.monotonic() + 5).here == (True, False)
