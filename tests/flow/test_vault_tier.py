"""Blocks that left an engine come back from a vault: to it, to another one, or not at all."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.flow.test_tiers import BLOCK_BYTES, same
from tests.flow.tiered_engine import BLOCK_TOKENS
from tests.flow.vault_engine import VaultEngine
from tests.vault.shard_process import MIB, ShardHandle, client, session, shard
from tests.waiting import await_that
from workers.vault.disk import DiskExtent
from workers.vault.pages import FORMAT
from workers.vault.region import READ, WRITE

# 33 have two runs of a vault only where runs are shorter; 70 have two as they are.
SIZES = (1, 31, 33, 70)
TIERS = {
    "host": {"bytes": 200 * BLOCK_BYTES},
    "vault": {"shards": 1, "memory_bytes": 64 * MIB},
}
BALANCED = {"jobs": 0, "storing": 0, "pinned": 0}
# A deadline of the tier (2 s), and what a busy machine adds.
BOUND_S = 8.0


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardHandle]:
    """A shard whose blocks outlive it."""
    folder = tmp_path_factory.mktemp("shard")
    disk = DiskExtent(path=str(folder / "extent"), bytes=128 * MIB, segment_bytes=16 * MIB)
    with shard(folder, fingerprint=FORMAT, disk=disk) as handle:
        yield handle


def _engine(model: Path, folder: Path, vault: ShardHandle, **more: Any) -> VaultEngine:
    addresses = {vault.name: vault.seat.address or ""}
    return VaultEngine(model, folder, TIERS, addresses, max_model_len=2560, **more)


@pytest.fixture(scope="module")
def engine(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, vault: ShardHandle
) -> Iterator[Any]:
    """One whose device holds 96 blocks, and what device hits of each size answer there."""
    folder = tmp_path_factory.mktemp("one")
    with _engine(tiny_model, folder, vault, kv_bytes=96 * BLOCK_BYTES) as one:
        hits = {}
        for blocks in SIZES:
            cold = one.run(blocks, blocks)
            assert cold["computed"] == blocks * BLOCK_TOKENS + 5
            assert cold["vault_stored_bytes"] == cold["host_stored_bytes"] == blocks * BLOCK_BYTES
            hits[blocks] = one.run(blocks, blocks)
            assert hits[blocks]["device"] == blocks * BLOCK_TOKENS
        yield one, hits


def served(answer: dict[str, Any], hit: dict[str, Any], blocks: int) -> None:
    """It is a device hit's answer, and the vault brought every full block of it."""
    same(answer, hit)
    assert answer["prompt_tokens_vault"] == blocks * BLOCK_TOKENS
    assert answer["vault_loaded_bytes"] == blocks * BLOCK_BYTES
    assert (answer["prompt_tokens_host"], answer["device"], answer["computed"]) == (0, 0, 5)
    assert answer["prompt_tokens_received"] == answer["failed_loads"] == 0


@pytest.mark.parametrize("blocks", SIZES)
def test_what_an_engine_lost_comes_back_to_it(
    engine: tuple[VaultEngine, dict[int, Any]], blocks: int
) -> None:
    """Tokens and logprobs equal a device hit's. The host tier has the blocks again afterwards."""
    one, hits = engine
    assert one.ask("reset", host=True)
    served(one.run(blocks, blocks), hits[blocks], blocks)
    assert one.ask("reset", host=False)
    again = one.run(blocks, blocks)
    same(again, hits[blocks])
    assert again["prompt_tokens_host"] == blocks * BLOCK_TOKENS
    assert one.ask("books") == BALANCED


def test_what_others_displaced_comes_back(engine: tuple[VaultEngine, dict[int, Any]]) -> None:
    """Device and host tier are full of other prompts."""
    one, hits = engine
    for other in range(100, 104):
        one.run(other, 70)
    served(one.run(33, 33), hits[33], 33)


def test_another_replica_finds_what_one_stored(
    tiny_model: Path, tmp_path: Path, engine: tuple[VaultEngine, dict[int, Any]], vault: ShardHandle
) -> None:
    """A fresh process beside the first: it computes nothing but tails, stores nothing twice, and
    goes on when the shard was killed and serves under another address."""
    _, hits = engine
    with _engine(tiny_model, tmp_path, vault) as other:
        for blocks, hit in hits.items():
            answer = other.run(blocks, blocks)
            served(answer, hit, blocks)
            assert answer["vault_stored_bytes"] == 0
        vault.send(signal.SIGKILL)
        vault.start()
        try:
            assert other.ask("reset", host=True)
            lost = other.run(33, 33)
            assert lost["tokens"] == hits[33]["tokens"]
            assert lost["computed"] == 33 * BLOCK_TOKENS + 5
            assert other.ask("reset", host=True)
            assert other.ask("seat", addresses={vault.name: vault.seat.address})
            served(other.run(33, 33), hits[33], 33)
            assert other.ask("books") == BALANCED
        finally:
            one = engine[0]
            assert one.ask("seat", addresses={vault.name: vault.seat.address})


def test_readers_at_once_have_one_answer_and_one_fetch(
    engine: tuple[VaultEngine, dict[int, Any]],
) -> None:
    """Four requests for a prompt that only the vault has, and one for another such prompt: every
    answer is a device hit's, and no block comes twice."""
    one, hits = engine
    assert one.ask("reset", host=True)
    before = one.ask("totals")
    answers = one.ask("burst", prompts=[(31, 31)] * 4 + [(33, 33)], n=8)
    assert answers == [hits[31]["tokens"]] * 4 + [hits[33]["tokens"]]
    after = one.ask("totals")
    assert after["vault_loaded_bytes"] - before["vault_loaded_bytes"] == 64 * BLOCK_BYTES
    assert after["failed_loads"] == before["failed_loads"]
    assert one.ask("books") == BALANCED


def test_replicas_that_read_at_once_do_not_disturb_each_other(
    tiny_model: Path, tmp_path: Path, engine: tuple[VaultEngine, dict[int, Any]], vault: ShardHandle
) -> None:
    """Two processes ask one shard for the same blocks at the same time, again and again."""
    one, hits = engine
    with _engine(tiny_model, tmp_path, vault) as other:
        for _ in range(3):
            assert one.ask("reset", host=True)
            assert other.ask("reset", host=True)
            with ThreadPoolExecutor(2) as both:
                answers = list(both.map(lambda reader: reader.run(70, 70), (one, other)))
            for answer in answers:
                served(answer, hits[70], 70)
        assert one.ask("books") == other.ask("books") == BALANCED


def test_a_handoff_passes_a_vault_by(
    tiny_model: Path, tmp_path: Path, engine: tuple[VaultEngine, dict[int, Any]], vault: ShardHandle
) -> None:
    """A prefill engine takes its prefix from the vault and hands off; who is handed off to takes
    nothing else, though its vault has the prompt too; and what it took, it does not store again."""
    one, hits = engine
    with _engine(tiny_model, tmp_path, vault, role="prefill") as prefill:
        handed = prefill.ask("handoff", seed=33, blocks=33)
        assert handed["prompt_tokens_vault"] == 33 * BLOCK_TOKENS
        assert handed["computed"] == 5
        assert one.ask("reset", host=True)
        taken = one.ask("take", seed=33, blocks=33, handoff=handed["handoff"])
        assert taken["tokens"] == hits[33]["tokens"]
        assert taken["prompt_tokens_received"] >= 33 * BLOCK_TOKENS
        assert taken["prompt_tokens_vault"] == taken["vault_loaded_bytes"] == 0
        assert taken["vault_stored_bytes"] == 0
        prefill.ask("settle")
        assert prefill.ask("books") == one.ask("books") == BALANCED


def test_a_damaged_block_is_computed_again(
    engine: tuple[VaultEngine, dict[int, Any]], vault: ShardHandle
) -> None:
    """What does not match its checksum reaches no engine, and the right bytes take its place."""
    one, hits = engine
    assert one.ask("reset", host=True)
    served(one.run(31, 31), hits[31], 31)  # in the shard's memory now
    _overwrite(vault)
    assert one.ask("reset", host=True)
    answer = one.run(31, 31)
    assert answer["tokens"] == hits[31]["tokens"]
    assert answer["failed_loads"] == 1
    assert answer["prompt_tokens_vault"] < 31 * BLOCK_TOKENS
    assert answer["computed"] > 5
    assert "did not come, or damaged" in one.log.read_text()
    await_that(lambda: _whole(one, hits), "the vault has it again", 20.0)


def _whole(one: VaultEngine, hits: dict[int, Any]) -> bool:
    assert one.ask("reset", host=True)
    answer = one.run(31, 31)
    assert answer["tokens"] == hits[31]["tokens"]
    return bool(answer["prompt_tokens_vault"] == 31 * BLOCK_TOKENS)


def _overwrite(vault: ShardHandle) -> None:
    """One byte in the middle of each block that the shard has in memory."""
    with session(vault, 64 * MIB, FORMAT) as bare:
        bare.move(READ, [(0, [(0, 64 * MIB)])], time.monotonic() + 10)
        content, at = bytes(bare.staging), 0
        while (at := content.find(b"BEKV", at)) >= 0:
            middle = at + BLOCK_BYTES // 2
            bare.staging[0] = content[middle] ^ 1
            bare.move(WRITE, [(0, [(middle, 1)])], time.monotonic() + 10)
            at += BLOCK_BYTES


def test_an_erased_tenant_is_gone_from_the_vault(
    engine: tuple[VaultEngine, dict[int, Any]], vault: ShardHandle
) -> None:
    """Its blocks are computed again; the other tenant's come back."""
    one, _ = engine
    for salt in ("aa.1", "bb.1"):
        one.run(5, 6, salt=salt)
    with client(vault, fingerprint=FORMAT) as looking:
        before = looking.stats(5.0)[vault.name]
        assert one.ask("erase", tag="aa") == 6
        after = looking.stats(5.0)[vault.name]
    assert before is not None
    assert after is not None
    assert before.blocks - after.blocks == 6
    assert one.ask("reset", host=True)
    assert one.run(5, 6, salt="aa.1")["computed"] == 6 * BLOCK_TOKENS + 5
    assert one.run(5, 6, salt="bb.1")["prompt_tokens_vault"] == 6 * BLOCK_TOKENS


def test_a_stopped_vault_delays_and_changes_nothing(
    engine: tuple[VaultEngine, dict[int, Any]], vault: ShardHandle
) -> None:
    """A request waits no longer than a deadline for a shard that hangs, the next not at all."""
    one, hits = engine
    assert one.ask("reset", host=True)
    vault.send(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        answer = one.run(33, 33)
        assert time.monotonic() - begun < BOUND_S
        assert answer["tokens"] == hits[33]["tokens"]
        assert answer["computed"] == 33 * BLOCK_TOKENS + 5
    finally:
        vault.send(signal.SIGCONT)
    await_that(lambda: _back(one, hits), "the vault is used again", 40.0)
    assert one.ask("books") == BALANCED


def _back(one: VaultEngine, hits: dict[int, Any]) -> bool:
    assert one.ask("reset", host=True)
    answer = one.run(33, 33)
    assert answer["tokens"] == hits[33]["tokens"]
    return bool(answer["prompt_tokens_vault"])


def test_a_vault_killed_while_it_is_read(
    engine: tuple[VaultEngine, dict[int, Any]], vault: ShardHandle
) -> None:
    """Whenever it dies, the answer is right, comes in bounded time, and nothing stays held."""
    one, hits = engine
    for delay_s in (0.0, 0.004, 0.012):
        assert one.ask("reset", host=True)
        killer = threading.Timer(delay_s, vault.send, (signal.SIGKILL,))
        killer.start()
        begun = time.monotonic()
        answer = one.run(70, 70)
        assert time.monotonic() - begun < BOUND_S
        killer.join()
        assert answer["tokens"] == hits[70]["tokens"]
        assert one.ask("books") == BALANCED
        vault.start()
        assert one.ask("seat", addresses={vault.name: vault.seat.address})
    assert one.ask("reset", host=True)
    served(one.run(70, 70), hits[70], 70)
    assert one.ask("cores", seconds=2.0) <= 0.15


def test_an_engine_serves_without_its_vault(
    tiny_model: Path, tmp_path: Path, engine: tuple[VaultEngine, dict[int, Any]]
) -> None:
    """Nobody listens there from the start: answers are right, and no request is tried for ever."""
    _, hits = engine
    nobody = {"vault-0": "tcp://127.0.0.1:23199"}
    with VaultEngine(tiny_model, tmp_path, TIERS, nobody, up_s=0.5) as alone:
        for _ in range(2):
            assert alone.ask("reset", host=True)
            answer = alone.run(33, 33)
            assert answer["tokens"] == hits[33]["tokens"]
            assert answer["computed"] == 33 * BLOCK_TOKENS + 5
            assert answer["prompt_tokens_vault"] == answer["vault_stored_bytes"] == 0
        assert alone.ask("books") == BALANCED
