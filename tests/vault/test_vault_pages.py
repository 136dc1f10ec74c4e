"""A replica's pages in a vault of real shards, without an engine."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kv.codecs.codec import CodecName
from kv.codecs.page import PageShape
from kv.codecs.table import CODECS
from kv.vault.chains import Chains
from tests.vault.shard_process import MIB, SECRET, ShardHandle, session, shard
from tests.waiting import await_that
from workers.messages import Keep
from workers.vault import keys
from workers.vault.pages import FORMAT, Page, VaultPages
from workers.vault.region import READ, WRITE

PAGE, BLOCKS = 4096, 150
LAYOUT = b"layout-A----"
ENDS = {bytes([at, 1]) * 16 + bytes(4): 16 * (at + 1) for at in range(BLOCKS)}


def chains() -> Chains:
    made = Chains({0: 16})
    made.extend(ENDS)
    return made


def pages(fill: bool = True) -> list[Page]:
    """Every block with a page of its own, of bytes that only it has, or of zeros."""
    made = chains()
    return [
        Page(
            key, made.spot(key, end), memoryview(bytearray(key[:8] * (PAGE // 8) if fill else PAGE))
        )
        for key, end in ENDS.items()
    ]


@contextlib.contextmanager
def replica(
    *shards: ShardHandle, layout: bytes = LAYOUT, up: bool = True, shape: PageShape | None = None
) -> Iterator[VaultPages]:
    """One that knows where all the shards are."""
    names = [each.name for each in shards]
    made = VaultPages(names, keys.client_keys(SECRET), layout, PAGE, None, shape)
    try:
        made.seat({each.name: each.seat.address or "" for each in shards})
        assert not up or made.await_up(20.0)
        yield made
    finally:
        made.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ShardHandle]:
    with shard(tmp_path, fingerprint=FORMAT) as handle:
        yield handle


def _stores(vault: VaultPages, timeout_s: float = 10.0) -> int:
    stored = vault.store("tag", pages(), lambda spot: float(spot.start_token), timeout_s)
    assert stored.lost == 0
    return stored.sent_bytes


def test_pages_come_back_to_another_replica(tmp_path: Path) -> None:
    """Bit by bit, from all shards; what is there is not sent again."""
    with contextlib.ExitStack() as stack:
        names = ("vault-0", "vault-1", "vault-2")
        shards = [stack.enter_context(shard(tmp_path, n, fingerprint=FORMAT)) for n in names]
        one = stack.enter_context(replica(*shards))
        other = stack.enter_context(replica(*shards))
        runs = chains().runs()
        assert other.held(runs, 5.0) == frozenset()
        assert _stores(one) == BLOCKS * PAGE
        assert _stores(other) == 0
        assert other.held(runs, 5.0) == frozenset(ENDS)
        empty = pages(fill=False)
        assert sorted(other.load(empty, 10.0)) == sorted(ENDS)
        assert [bytes(page.row) for page in empty] == [bytes(page.row) for page in pages()]


def test_another_layout_finds_nothing(running: ShardHandle) -> None:
    """Blocks of two layouts lie side by side; neither is ever given for the other."""
    with replica(running) as one, replica(running, layout=b"layout-B----") as other:
        _stores(one)
        assert other.held(chains().runs(), 5.0) == frozenset()
        assert other.load(pages(fill=False), 5.0) == []
        assert _stores(other) == BLOCKS * PAGE


def test_questions_do_not_wait_for_pages_under_way(running: ShardHandle) -> None:
    """Each kind has a connection of its own: a store under way keeps no question back."""
    with replica(running) as vault:
        line = next(iter(vault._writing._lines.values()))
        with line.session(time.monotonic() + 5):
            begun = time.monotonic()
            assert vault.held(chains().runs(), 5.0) == frozenset()
            assert vault.load(pages(fill=False), 5.0) == []
            assert time.monotonic() - begun < 1.0


def test_a_damaged_block_is_not_taken(running: ShardHandle) -> None:
    """It and what is behind it in its run are computed; the shard drops it."""
    with replica(running) as vault:
        _stores(vault)
        with session(running, 64 * MIB, FORMAT) as bare:
            bare.move(READ, [(0, [(0, 64 * MIB)])], time.monotonic() + 10)
            at = bytes(bare.staging).index(pages()[7].row[:64])
            bare.staging[0] = 255 - bare.staging[at]
            bare.move(WRITE, [(0, [(at, 1)])], time.monotonic() + 10)
        came = vault.load(pages(fill=False), 10.0)
        assert set(came) == set(ENDS) - {pages()[7].key}
        await_that(
            lambda: vault.held(chains().runs(), 5.0) == frozenset(came), "it is dropped", 5.0
        )


def test_a_shard_that_is_gone_is_a_miss_and_comes_back_elsewhere(running: ShardHandle) -> None:
    """Killed, it has nothing at once; its successor is used as soon as its address is known."""
    with replica(running) as vault:
        _stores(vault)
        running.send(signal.SIGKILL)
        begun = time.monotonic()
        assert vault.held(chains().runs(), 5.0) == frozenset()
        assert vault.load(pages(fill=False), 5.0) == []
        assert vault.store("tag", pages(), lambda _: 1.0, 5.0).lost == BLOCKS
        assert vault.forget(["tag"], 5.0) == {"vault-0": "no answer"}
        assert time.monotonic() - begun < 2.0
        running.start()
        vault.seat({"vault-0": running.seat.address or ""})
        assert vault.await_up(5.0)
        assert _stores(vault) == BLOCKS * PAGE


def test_forgotten_blocks_are_gone(running: ShardHandle) -> None:
    """Every shard says that it has erased them."""
    with replica(running) as vault:
        _stores(vault)
        assert vault.forget(["tag"], 5.0) == {}
        assert vault.held(chains().runs(), 5.0) == frozenset()


def test_a_page_comes_back_as_its_codec_brings_it_and_only_to_who_allows_that(
    running: ShardHandle,
) -> None:
    """The numbers of a page are rounded by its request's codec, and what a row has beside them is
    zeros. A request that allows no codec, or another, gets none of it."""
    shape = PageShape(layers=1, tokens=16, kv_heads=2, head_dim=15)
    assert shape.page_bytes < PAGE
    rounded, codec = Keep(CodecName.INT8), CODECS[CodecName.INT8]
    random = torch.Generator().manual_seed(1)
    numbers = torch.randn(shape.page_bytes // 4, generator=random).numpy().tobytes()
    full = [replace(page, row=memoryview(bytearray(numbers.ljust(PAGE, b"x")))) for page in pages()]
    payload, expected = bytearray(codec.encoded_bytes(shape)), bytearray(shape.page_bytes)
    codec.encode(numbers, shape, payload)
    codec.decode(payload, shape, expected)
    with replica(running, shape=shape) as vault:
        assert vault.store("tag", full, lambda _: 1.0, 10.0, rounded).lost == 0
        empty = pages(fill=False)
        assert len(vault.load(empty, 10.0, rounded)) == BLOCKS
        assert {bytes(page.row) for page in empty} == {bytes(expected).ljust(PAGE, b"\0")}
        assert vault.load(pages(), 10.0) == []
        assert vault.load(pages(), 10.0, Keep(CodecName.TQ4)) == []
