"""A shard and its clients in real processes: what is put comes back over NIXL, bit by bit."""

import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import zmq

from kv.codecs.codec import CodecName
from kv.codecs.frame import decode_frame, encode_frame, frame_bytes
from kv.codecs.page import PageShape
from kv.codecs.table import CODECS, LOSSLESS
from kv.errors import VaultLostError
from kv.vault import wire
from tests.unit.kv.vault_frames import frame_of
from tests.vault.blocks import RUN, frames, get, put, stored
from tests.vault.shard_process import FINGERPRINT, MIB, SECRET, ShardHandle, client, shard
from tests.waiting import await_that
from workers import curve
from workers.vault import keys
from workers.vault.client import VaultClient
from workers.vault.jobs import Block
from workers.vault.line import Session


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ShardHandle]:
    with shard(tmp_path) as handle:
        yield handle


@pytest.fixture
def vault(running: ShardHandle) -> Iterator[VaultClient]:
    with client(running) as made:
        yield made


@pytest.mark.parametrize("n_bytes", [72, 4096, 100_000, 3 * MIB])
def test_bytes_come_back_exactly(running: ShardHandle, n_bytes: int) -> None:
    """Of small and large blocks, more of them than staging takes at once, by another client."""
    blocks = frames(9, n_bytes)
    with client(running) as writer, client(running) as reader:
        assert stored(writer, blocks)
        assert get(reader, list(blocks)) == blocks


@pytest.mark.parametrize("name", [CodecName.RAW, CodecName.INT8])
def test_pages_come_back_through_a_codec(vault: VaultClient, name: CodecName) -> None:
    """A client encodes into what it sends and decodes out of what it reads."""
    shape, codec = PageShape(layers=2, tokens=16, kv_heads=2, head_dim=64), CODECS[name]
    page = struct.pack(f"{shape.page_bytes // 4}f", *_numbers(shape.page_bytes // 4))
    expected, back = bytearray(shape.page_bytes), bytearray(shape.page_bytes)
    frame = bytearray(frame_bytes(codec, shape))
    encode_frame(codec, page, shape, frame)
    decode_frame(frame, shape, CODECS, expected)

    def fill(into: memoryview) -> None:
        encode_frame(codec, page, shape, into)

    (verdict,) = vault.put(RUN, "tag", name, [Block(b"k", None, len(frame), 1.0, fill)], 5.0)
    assert verdict.outcome == "stored"
    taken = vault.get(RUN, [b"k"], lambda _, f: _decode(f, shape, back), 5.0)
    assert taken == [b"k"]
    assert back == expected


def _numbers(count: int) -> Iterator[float]:
    return ((at % 101) / 7 - 5 for at in range(count))


def _decode(frame: memoryview, shape: PageShape, page: bytearray) -> None:
    decode_frame(frame, shape, CODECS, page)


def test_a_reader_that_did_not_opt_in_has_a_miss(vault: VaultClient) -> None:
    """A frame that the reader's decoder refuses is left out; the connection goes on."""
    shape = PageShape(layers=1, tokens=8, kv_heads=1, head_dim=64)
    codec, back = CODECS[CodecName.FP16], bytearray(shape.page_bytes)
    block = Block(
        b"k",
        None,
        frame_bytes(codec, shape),
        1.0,
        lambda into: encode_frame(codec, bytes(shape.page_bytes), shape, into),
    )
    assert vault.put(RUN, "tag", "fp16", [block], 5.0)[0].outcome == "stored"

    def take(_: bytes, frame: memoryview) -> None:
        decode_frame(frame, shape, LOSSLESS, back)

    assert vault.get(RUN, [b"k"], take, 5.0) == []
    assert stored(vault, frames(1, 1000))


def test_a_block_that_cannot_be_encoded_is_not_stored(vault: VaultClient) -> None:
    """The others of its batch are."""
    shape = PageShape(layers=1, tokens=8, kv_heads=1, head_dim=64)
    good = frame_of(1, 1000)

    def refused(into: memoryview) -> None:
        encode_frame(CODECS[CodecName.RAW], b"too short", shape, into)

    def fill(into: memoryview) -> None:
        into[:] = good

    blocks = [Block(b"bad", None, 1000, 1.0, refused), Block(b"good", None, len(good), 1.0, fill)]
    verdicts = vault.put(RUN, "tag", "raw", blocks, 5.0)
    assert [v.reason for v in verdicts] == ["not_written", ""]
    assert get(vault, [b"good"]) == {b"good": good}
    assert get(vault, [b"bad"]) == {}


def test_only_leading_blocks_are_lent(vault: VaultClient) -> None:
    """What comes behind a miss is of no use."""
    blocks = frames(3, 5000)
    known = list(blocks)
    del blocks[known[1]]
    assert stored(vault, blocks)
    assert list(get(vault, known)) == known[:1]


def test_a_block_is_stored_once(running: ShardHandle, vault: VaultClient) -> None:
    """A second replica that has it sends no bytes and is told that it is there."""
    blocks = frames(2, 50_000)
    assert stored(vault, blocks)
    before = vault.stats(5.0)["vault-0"]
    with client(running) as other:
        sent = []
        assert set(put(other, blocks, meanwhile=lambda: sent.append(1))) == {"stored"}
        assert not sent
    after = vault.stats(5.0)["vault-0"]
    assert before is not None
    assert after is not None
    assert before.stored_bytes == after.stored_bytes


def test_many_clients_at_once(running: ShardHandle) -> None:
    """Four clients of two threads each store and read different and common blocks: each reads what
    was stored for its key, and the shard has no lease left."""
    failures: list[str] = []

    def work(vault: VaultClient, which: int) -> None:
        for turn in range(5):
            own = frames(4, 30_000 + 8 * which, first=100 * which + 4 * turn)
            run = f"run-{which}".encode()
            if not stored(vault, own, run=run) or get(vault, list(own), run=run) != own:
                failures.append(f"client {which} turn {turn}")
            common = frames(6, 20_000, first=5000)
            put(vault, common)
            found = get(vault, list(common))
            if any(common[key] != frame for key, frame in found.items()):
                failures.append(f"client {which} turn {turn}: another's bytes")

    with client(running) as a, client(running) as b, client(running) as c, client(running) as d:
        threads = [
            threading.Thread(target=work, args=(vault, 10 * at + half))
            for at, vault in enumerate((a, b, c, d))
            for half in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        await_that(lambda: _stats(a).leases == 0, "no lease is left")
        assert _stats(a).quarantined_bytes == 0
        a.forget(["tag"], 5.0)
        assert _stats(a).free_bytes == 64 * MIB


def test_a_call_begins_when_the_connection_is_its_own(running: ShardHandle) -> None:
    """What two calls wait for each other is told apart from what the shard and its link take."""
    blocks, begun_s, go = frames(2, 2000), list[float](), threading.Event()

    def slowly(_: bytes, __: memoryview) -> None:
        begun_s.append(0.0)
        assert go.wait(10.0)

    def begun() -> None:
        begun_s.append(time.monotonic())

    with client(running) as vault, ThreadPoolExecutor(2) as threads:
        assert stored(vault, blocks)
        first = threads.submit(vault.get, RUN, list(blocks)[:1], slowly, 20.0)
        await_that(lambda: begun_s, "the first reads")
        second = threads.submit(vault.get, RUN, list(blocks), lambda *_: None, 20.0, begun)
        time.sleep(0.3)
        assert len(begun_s) == 1
        went_s = time.monotonic()
        go.set()
        assert len(first.result(10.0)) == 1
        assert second.result(10.0) == list(blocks)
        assert begun_s[1] >= went_s


def _stats(vault: VaultClient) -> wire.Stats:
    stats = vault.stats(5.0)["vault-0"]
    assert stats is not None
    return stats


def test_blocks_are_spread_over_shards(tmp_path: Path, running: ShardHandle) -> None:
    """Each run lies on one shard, and both have some."""
    with shard(tmp_path, "vault-1") as other, client(running, other) as vault:
        for at in range(12):
            blocks = frames(2, 2000, first=10 * at)
            assert stored(vault, blocks, run=b"%d" % at)
            assert get(vault, list(blocks), run=b"%d" % at) == blocks
        held = [stats.blocks for stats in vault.stats(5.0).values() if stats is not None]
        assert sum(held) == 24
        assert min(held) > 0
        other.process.kill()
        found = [get(vault, list(frames(2, 2000, 10 * at)), 1.0, b"%d" % at) for at in range(12)]
        assert sum(map(len, found)) == held[0]


@pytest.mark.parametrize("whose", ["an ingress", "another cluster", "nobody"])
def test_a_stranger_is_refused(running: ShardHandle, whose: str) -> None:
    """The keys of the cluster's own ingresses open no vault either."""
    theirs = {
        "an ingress": curve.client_keys(SECRET),
        "another cluster": keys.client_keys(bytes(32)),
        "nobody": _nobody(),
    }[whose]
    made = VaultClient({"vault-0": running.seat}, theirs, FINGERPRINT)
    try:
        assert not made.await_up(1.5)
        assert get(made, [b"k"], 0.5) == {}
        assert put(made, frames(1, 100), 0.5) == ["lost"]
    finally:
        made.close()


def _nobody() -> curve.ClientKeys:
    public, secret = zmq.curve_keypair()
    return curve.ClientKeys(secret, public, keys.client_keys(SECRET).server)


def test_another_model_is_refused(running: ShardHandle) -> None:
    """Its blocks have the same names and other bytes."""
    theirs = keys.client_keys(SECRET)
    with zmq.Context() as context, pytest.raises(VaultLostError, match="blocks of 76"):
        Session(context, running.seat.address, theirs, "76" * 12, MIB)


def test_noise_does_not_end_a_shard(running: ShardHandle, vault: VaultClient) -> None:
    """Messages that are none, and questions without a hello, from one who has the keys."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as noisy:
        curve.unlock(noisy, keys.client_keys(SECRET))
        noisy.setsockopt(zmq.LINGER, 500)
        noisy.connect(running.seat.address)
        for noise in (b"", b"\x80", bytes(range(256)), b"\x81\xa4type\xa3put"):
            noisy.send(noise)
        noisy.send(wire.encode(wire.Get(0, (b"k",))))
        assert noisy.poll(5000)
        assert isinstance(wire.decode_reply(noisy.recv(), "shard"), wire.Denied)
    assert stored(vault, frames(1, 1000))
    assert "message dropped" in running.log()


def test_a_frame_too_large_for_staging_is_left_out(vault: VaultClient) -> None:
    """Larger than half of it: neither stored nor in the way of others."""
    blocks = frames(1, 5 * MIB) | frames(1, 1000, first=1)
    assert put(vault, blocks) == ["lost", "stored"]


def test_an_idle_shard_rests(tmp_path: Path) -> None:
    """With a client connected that has moved bytes: NIXL's threads and the server's ticks take at
    most 0.05 of a core."""
    with shard(tmp_path) as handle, client(handle) as vault:
        assert stored(vault, frames(4, MIB))
        assert len(get(vault, list(frames(4, MIB)))) == 4
        time.sleep(0.5)
        process = psutil.Process(handle.process.pid)
        own = psutil.Process()
        before, own_before, begun = process.cpu_times(), own.cpu_times(), time.monotonic()
        time.sleep(5.0)
        passed_s, after, own_after = time.monotonic() - begun, process.cpu_times(), own.cpu_times()
        used = (after.user + after.system - before.user - before.system) / passed_s
        assert used <= 0.05
        mine = own_after.user + own_after.system - own_before.user - own_before.system
        assert mine / passed_s <= 0.05
