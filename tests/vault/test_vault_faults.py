"""Shards and clients that are killed, stopped or damaged: a miss by the deadline, never a wrong
byte."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kv.vault import wire
from tests.vault import client_process
from tests.vault.blocks import frames, get, put, stored
from tests.vault.shard_process import MIB, ROOT, client, session, shard
from tests.waiting import await_that
from workers.vault.client import VaultClient
from workers.vault.disk import DiskExtent
from workers.vault.line import Session
from workers.vault.region import READ, WRITE

# What a call may take beyond its deadline on a busy machine.
SLACK_S = 0.5
BLOCKS = frames(12, MIB)


def extent(folder: Path, n_bytes: int = 64 * MIB) -> DiskExtent:
    return DiskExtent(path=str(folder / "extent"), bytes=n_bytes, segment_bytes=8 * MIB)


def stats(vault: VaultClient) -> wire.Stats:
    found = vault.stats(5.0)["vault-0"]
    assert found is not None
    return found


@contextmanager
def process(script: str, *words: str, **env: str) -> Iterator["subprocess.Popen[str]"]:
    """A client in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *words]
    pipe = subprocess.PIPE
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    started = subprocess.Popen(command, env=merged, stdin=pipe, stdout=pipe, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.wait(10)
        for stream in (started.stdin, started.stdout):
            assert stream is not None
            stream.close()


def line_of(client: "subprocess.Popen[str]") -> str:
    """What it says next; NIXL and UCX speak in between."""
    assert client.stdout is not None
    while (line := client.stdout.readline()) and not line.startswith("> "):
        pass
    return line.removeprefix("> ").strip()


def tell(client: "subprocess.Popen[str]") -> None:
    assert client.stdin is not None
    client.stdin.write("\n")
    client.stdin.flush()


# -- the shard


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_a_shard_lost_during_a_get(tmp_path: Path, number: signal.Signals) -> None:
    """Between two jobs of one get: what came by then is right, the rest are misses by the
    deadline, and the calls after that cost nothing."""
    with shard(tmp_path) as handle, client(handle, staging_bytes=4 * MIB) as vault:
        assert stored(vault, BLOCKS)
        done: list[int] = []

        def lose() -> None:
            if not done:
                handle.send(number)
            done.append(1)

        begun = time.monotonic()
        found = get(vault, list(BLOCKS), 1.0, meanwhile=lose)
        assert time.monotonic() - begun < 1.0 + SLACK_S
        assert all(BLOCKS[key] == frame for key, frame in found.items())
        begun = time.monotonic()
        again = [get(vault, list(BLOCKS), 1.0) for _ in range(3)]
        assert time.monotonic() - begun < 3 * (1.0 + SLACK_S)
        if number is signal.SIGKILL:
            assert again[-1] == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_a_shard_lost_during_a_put(tmp_path: Path, number: signal.Signals) -> None:
    """Between the grant and the acknowledgement: not stored, by the deadline."""
    with shard(tmp_path) as handle, client(handle) as vault:
        begun = time.monotonic()
        outcomes = put(vault, frames(3, MIB), 1.0, meanwhile=lambda: handle.send(number))
        assert time.monotonic() - begun < 1.0 + SLACK_S
        assert set(outcomes) == {"lost"}
        begun = time.monotonic()
        assert set(put(vault, frames(3, MIB), 1.0)) == {"lost"}
        assert get(vault, [b"k"], 1.0) == {}
        assert time.monotonic() - begun < SLACK_S


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=str)
@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.01])
def test_a_shard_lost_within_a_transfer(
    tmp_path: Path, number: signal.Signals, after_s: float
) -> None:
    """Over TCP, where bytes come only while the shard runs: the get ends by its deadline with
    whole blocks or none, and so do those after it."""
    tcp = {"UCX_TLS": "tcp"}
    with (
        shard(tmp_path, env=tcp) as handle,
        process("reading_process.py", handle.seat.address, "1.0", **tcp) as reader,
    ):
        for _ in range(3):
            came, _ = line_of(reader).split()
            assert int(came) == 24
        time.sleep(after_s)
        handle.send(number)
        ended = [line_of(reader).split() for _ in range(20)]
        assert all(float(took_s) < 1.0 + SLACK_S for _, took_s in ended)
        assert int(ended[-1][0]) == 0


def test_a_stopped_shard_serves_again(tmp_path: Path) -> None:
    """Once it goes on, the client connects anew by itself, and nothing is left of what it had
    under way."""
    with shard(tmp_path, write_s=2.0, settle_s=0.5) as handle, client(handle) as vault:
        assert stored(vault, BLOCKS)
        put(vault, frames(3, MIB, 50), 0.5, meanwhile=lambda: handle.send(signal.SIGSTOP))
        assert get(vault, list(BLOCKS), 0.5) == {}
        handle.send(signal.SIGCONT)
        await_that(lambda: get(vault, list(BLOCKS), 2.0) == BLOCKS, "it serves again", 20.0)
        await_that(lambda: stats(vault).quarantined_bytes == 0, "nothing is held back")
        assert stored(vault, frames(3, MIB, 50))


def test_a_killed_shard_comes_back_with_what_it_acknowledged(tmp_path: Path) -> None:
    """From its disk extent, in a new process at another address; while it was dead, misses."""
    with shard(tmp_path, disk=extent(tmp_path)) as handle:
        with client(handle) as vault:
            assert stored(vault, BLOCKS)
            outcomes = put(
                vault, frames(1, MIB, 50), 1.0, meanwhile=lambda: handle.send(signal.SIGKILL)
            )
            assert outcomes == ["lost"]
        handle.start()
        with client(handle) as vault:
            assert get(vault, list(BLOCKS)) == BLOCKS
            assert get(vault, list(frames(1, MIB, 50))) == {}
            assert stored(vault, frames(1, MIB, 50))


def test_a_shard_killed_at_any_time_keeps_its_word(tmp_path: Path) -> None:
    """A writer stores one block after the other; whatever was acknowledged when the shard is
    killed, whole, is there afterwards."""
    with shard(tmp_path, disk=extent(tmp_path)) as handle:
        kept: dict[bytes, bytes] = {}
        for turn in range(4):
            with client(handle) as vault:
                end_s = time.monotonic() + 0.2 + 0.07 * turn
                while time.monotonic() < end_s:
                    block = frames(1, 10_000, first=len(kept))
                    if stored(vault, block):
                        kept |= block
                handle.send(signal.SIGKILL)
            handle.start()
        with client(handle) as vault:
            assert len(kept) > 20
            found: dict[bytes, bytes] = {}
            for key in kept:
                found |= get(vault, [key])
            assert found == kept


def test_more_than_memory_lies_on_disk(tmp_path: Path) -> None:
    """A shard with 4 MiB of memory serves 12 MiB, loading what is asked for."""
    settings = {"memory_bytes": 4 * MIB, "disk": extent(tmp_path)}
    with shard(tmp_path, **settings) as handle, client(handle) as vault:  # type: ignore[arg-type]
        for key, frame in BLOCKS.items():
            assert stored(vault, {key: frame})
        for key, frame in BLOCKS.items():
            assert get(vault, [key]) == {key: frame}
        damaged = list((tmp_path / "extent").rglob("*.seg"))
        for path in damaged:
            _flip_bits(path)
        found: dict[bytes, bytes] = {}
        for key in BLOCKS:
            found |= get(vault, [key])
        assert all(BLOCKS[key] == frame for key, frame in found.items())
        assert len(found) < len(BLOCKS)


def _flip_bits(path: Path) -> None:
    """One in each 100,000 bytes, behind the first block's header."""
    with path.open("r+b") as file:
        size = path.stat().st_size
        for at in range(50_000, size, 100_000):
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 0x10]))


# -- the clients


def test_a_client_killed_between_grant_and_written(tmp_path: Path) -> None:
    """Its place comes back, and the block can be stored by another, well before its grant ends."""
    key, frame = client_process.KEY, client_process.FRAME
    with shard(tmp_path, settle_s=0.2) as handle, client(handle) as vault:
        with process("client_process.py", handle.seat.address) as doomed:
            assert line_of(doomed) == "granted"
            (reason,) = put(vault, {key: frame})
            assert reason.endswith("writes it")
            assert get(vault, [key]) == {}
            doomed.send_signal(signal.SIGKILL)
            await_that(lambda: stats(vault).blocks == 0, "its grant ends", 5.0)
        await_that(lambda: stats(vault).free_bytes == 64 * MIB, "its place is free", 5.0)
        assert stored(vault, {key: frame})


def test_a_client_that_writes_after_its_grant(tmp_path: Path) -> None:
    """One that was stopped writes where nobody else's block lies: the shard, full otherwise, gives
    the place to others only when that client is gone."""
    with (
        shard(tmp_path, memory_bytes=8 * MIB, write_s=0.7, settle_s=0.2) as handle,
        client(handle) as vault,
        process("client_process.py", handle.seat.address) as slow,
    ):
        assert line_of(slow) == "granted"
        slow.send_signal(signal.SIGSTOP)
        await_that(lambda: stats(vault).quarantined_bytes > 0, "its grant ends", 5.0)
        blocks = frames(8, MIB - 1024)
        fitting = [
            key for key, one in zip(blocks, put(vault, blocks), strict=True) if one == "stored"
        ]
        assert len(fitting) == 7
        slow.send_signal(signal.SIGCONT)
        tell(slow)
        assert line_of(slow) == "written"
        assert get(vault, fitting) == {key: blocks[key] for key in fitting}
        assert get(vault, [client_process.KEY]) == {}
        assert stats(vault).quarantined_bytes > 0
        slow.kill()
        await_that(lambda: stats(vault).quarantined_bytes == 0, "its place comes back", 5.0)
        assert get(vault, fitting) == {key: blocks[key] for key in fitting}
        assert stored(vault, {key: one for key, one in blocks.items() if key not in fitting})


def test_a_client_killed_while_it_reads(tmp_path: Path) -> None:
    """Its leases end with its connection, long before their time."""
    with shard(tmp_path, lease_s=300.0) as handle, client(handle) as vault:
        assert stored(vault, BLOCKS)
        with session(handle) as reader:
            reader.ask(wire.Get(0, tuple(BLOCKS)), wire.Lent, time.monotonic() + 5)
            assert stats(vault).leases == 1
        await_that(lambda: stats(vault).leases == 0, "its lease ends", 5.0)


@pytest.mark.parametrize(("wanted_s", "lease_s"), [(0.0, 10.0), (60.0, 60.0), (1e6, 120.0)])
def test_a_slow_reader_is_lent_blocks_for_longer(
    tmp_path: Path, wanted_s: float, lease_s: float
) -> None:
    """As long as it asks for, within what a shard is ready to give."""
    with shard(tmp_path) as handle, client(handle) as vault:
        assert stored(vault, BLOCKS)
        with session(handle) as reader:
            get_all = wire.Get(0, tuple(BLOCKS), wanted_s)
            assert reader.ask(get_all, wire.Lent, time.monotonic() + 5).lease_s == lease_s


# -- the bytes


def lent(bare: Session, number: int, key: bytes) -> wire.Place:
    return bare.ask(wire.Get(number, (key,)), wire.Lent, time.monotonic() + 5).places[0]


@pytest.mark.parametrize("how", ["a bit", "another block"])
def test_bytes_that_change_in_memory_are_a_miss(tmp_path: Path, how: str) -> None:
    """A flipped bit, and another block's frame that is whole: neither is given to a reader, and
    the block is dropped so that it is stored anew."""
    blocks = frames(2, 100_000)
    first, second = blocks
    with shard(tmp_path) as handle, client(handle) as vault:
        assert stored(vault, blocks)
        with session(handle) as vandal:
            to, other = lent(vandal, 0, first), lent(vandal, 1, second)
            source = to if how == "a bit" else other
            vandal.move(READ, [(0, source.extents)], time.monotonic() + 5)
            if how == "a bit":
                vandal.staging[50_000] ^= 1
            vandal.move(WRITE, [(0, to.extents)], time.monotonic() + 5)
        assert get(vault, [first]) == {}
        assert get(vault, [second]) == {second: blocks[second]}
        await_that(lambda: stats(vault).blocks == 1, "the damaged block is dropped", 5.0)
        assert "was damaged in memory" in handle.log()
        await_that(lambda: stored(vault, blocks), "it is stored once its readers have ended", 5.0)
        assert get(vault, list(blocks)) == blocks


@pytest.mark.parametrize("on_disk", [False, True])
def test_forgetting_leaves_no_byte(tmp_path: Path, on_disk: bool) -> None:
    """What the shard's memory and its files hold of a tenant is overwritten; others' stays."""
    disk = extent(tmp_path) if on_disk else None
    mine, others = frames(4, 300_000), frames(2, 300_000, first=100)
    pattern = mine[next(iter(mine))][64:72] * 100
    with shard(tmp_path, memory_bytes=8 * MIB, disk=disk) as handle, client(handle) as vault:
        assert stored(vault, mine, tenant="leaver")
        assert stored(vault, others, tenant="stayer", run=b"run")
        with session(handle, 8 * MIB) as curious:
            assert pattern in _memory(curious)
            answer = vault.forget(["leaver"], 5.0)["vault-0"]
            assert answer is not None
            assert (answer.blocks, answer.in_use_bytes, answer.erased) == (4, 0, True)
            assert pattern not in _memory(curious)
        for path in (tmp_path / "extent").rglob("*.seg"):
            assert pattern not in path.read_bytes()
        assert get(vault, list(mine)) == {}
        assert get(vault, list(others)) == others
        assert set(put(vault, mine, tenant="leaver")) == {"forgotten"}
        if on_disk:
            handle.send(signal.SIGKILL)
            handle.start()
            with client(handle) as fresh:
                assert get(fresh, list(mine)) == {}
                assert get(fresh, list(others)) == others


def _memory(bare: Session) -> bytes:
    """All of a shard's memory, as a client can read it."""
    bare.move(READ, [(0, [(0, len(bare.staging))])], time.monotonic() + 5)
    return bytes(bare.staging)


def test_a_full_shard_evicts_and_refuses(tmp_path: Path) -> None:
    """The least recently used go for what comes; a tenant goes no further than its quota, and what
    fits nowhere is refused with its reason."""
    settings = {"memory_bytes": 4 * MIB, "tenant_bytes": {"small": MIB}, "policy": "lru"}
    with shard(tmp_path, **settings) as handle, client(handle) as vault:  # type: ignore[arg-type]
        blocks = frames(6, MIB - 1024)
        for key, frame in blocks.items():
            assert stored(vault, {key: frame}, tenant="large")
        have = [key for key in blocks if get(vault, [key])]
        assert have == list(blocks)[2:]
        own = frames(3, 500_000, first=50)
        for key, frame in own.items():
            assert stored(vault, {key: frame}, tenant="small")
        assert [bool(get(vault, [key])) for key in own] == [False, True, True]
        big = frames(1, 2 * MIB, first=60)
        assert put(vault, big, tenant="small") == ["larger_than_quota"]


def test_a_block_lives_as_long_as_was_asked(tmp_path: Path) -> None:
    """And no longer."""
    with shard(tmp_path) as handle, client(handle) as vault:
        blocks = frames(1, 1000)
        assert stored(vault, blocks, ttl_s=1.0)
        assert get(vault, list(blocks)) == blocks
        time.sleep(1.1)
        assert get(vault, list(blocks)) == {}
