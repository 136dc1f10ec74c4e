"""Blocks come from another replica's host tier: exactly, in time, or not at all."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.peering_engine import PeeringEngine
from tests.flow.tiered_engine import BLOCK_TOKENS
from tests.waiting import await_that

BLOCK_BYTES = 32_768
SIZES = (1, 31, 32)
TIMEOUT_S = 2.0
SECTION = {"host": {"bytes": 256 * BLOCK_BYTES}, "peer": {"timeout_s": TIMEOUT_S}}


def same(answer: dict[str, Any], hit: dict[str, Any]) -> None:
    """Greedy tokens, and the logprobs bit for bit."""
    assert answer["tokens"] == hit["tokens"]
    assert answer["logprobs"] == hit["logprobs"]
    assert len(hit["logprobs"]) == len(hit["tokens"]) > 1


def hint(engine: PeeringEngine, **more: Any) -> dict[str, Any]:
    return {"address": engine.ask("address"), **more}


def complaints(engine: PeeringEngine) -> list[str]:
    return [line for line in engine.log.read_text().splitlines() if "peer tcp://" in line]


def forget_host(engine: PeeringEngine) -> None:
    assert engine.ask("reset", host=True)


@pytest.fixture(scope="module")
def reader(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeeringEngine]:
    folder = tmp_path_factory.mktemp("reader")
    with PeeringEngine(tiny_model, folder, SECTION) as engine:
        engine.ask("small_jobs", n_bytes=4 * BLOCK_BYTES)
        yield engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lenders")


@pytest.fixture
def lender(tiny_model: Path, folders: Path) -> Iterator[PeeringEngine]:
    """One for each test that breaks it."""
    engine = PeeringEngine(tiny_model, folders / str(time.time_ns()), SECTION)
    try:
        yield engine
    finally:
        if engine.process.poll() is None:
            engine.process.send_signal(signal.SIGCONT)
        engine.kill()


@pytest.fixture(scope="module")
def whole(tiny_model: Path, folders: Path) -> Iterator[PeeringEngine]:
    """A lender that nothing happens to."""
    with PeeringEngine(tiny_model, folders / "whole", SECTION) as engine:
        yield engine


def test_a_peers_blocks_equal_a_device_hit(reader: PeeringEngine, whole: PeeringEngine) -> None:
    """Tokens and logprobs, at the sizes around a block's and a job's end; both ends count the bytes
    that crossed, and nothing stays lent. Without a hint nobody is asked."""
    for blocks in SIZES:
        whole.run(blocks, blocks)
        hit = whole.run(blocks, blocks)
        assert hit["device"] == blocks * BLOCK_TOKENS
        lent = whole.ask("lending")["bytes"]
        answer = reader.run(blocks, blocks, peer=hint(whole))
        same(answer, hit)
        assert answer["prompt_tokens_peer"] == blocks * BLOCK_TOKENS
        assert answer["peer_loaded_bytes"] == blocks * BLOCK_BYTES
        assert (answer["device"], answer["computed"], answer["failed_loads"]) == (0, 5, 0)
        assert answer["prompt_tokens_received"] == answer["disk_loaded_bytes"] == 0
        after = whole.ask("lending")
        assert after["bytes"] - lent == blocks * BLOCK_BYTES
        assert (after["loans"], after["lent"], after["pinned"]) == (0, 0, 0)
    whole.run(77, 4)
    assert reader.run(77, 4)["computed"] == 4 * BLOCK_TOKENS + 5
    assert complaints(reader) == []


def test_what_came_is_the_readers_own(reader: PeeringEngine, whole: PeeringEngine) -> None:
    """The reader's host tier has the blocks afterwards, and asks nobody for them again."""
    whole.run(50, 8)
    reader.run(50, 8, peer=hint(whole))
    assert reader.ask("reset", host=False)
    again = reader.run(50, 8, peer=hint(whole))
    assert again["prompt_tokens_host"] == 8 * BLOCK_TOKENS
    assert again["prompt_tokens_peer"] == again["peer_loaded_bytes"] == 0


def test_salts_keep_tenants_apart_and_forget_ends_loans(
    reader: PeeringEngine, whole: PeeringEngine
) -> None:
    """A block is lent by its exact name; an erased tenant's is not, and one that was erased at the
    reader is not fetched from a peer that has it still."""
    for salt in ("aa.1", "bb.1"):
        whole.run(60, 6, salt=salt)
    assert reader.run(60, 6, salt="cc.1", peer=hint(whole))["prompt_tokens_peer"] == 0
    whole.ask("erase", tag="aa")
    erased = reader.run(60, 6, salt="aa.1", peer=hint(whole))
    assert erased["computed"] == 6 * BLOCK_TOKENS + 5
    assert erased["prompt_tokens_peer"] == erased["peer_loaded_bytes"] == 0
    reader.ask("erase", tag="bb")
    assert reader.run(60, 6, salt="bb.1", peer=hint(whole))["prompt_tokens_peer"] == 0
    whole.run(61, 6, salt="dd.1")
    fetched = reader.run(61, 6, salt="dd.1", peer=hint(whole))
    assert fetched["prompt_tokens_peer"] == 6 * BLOCK_TOKENS
    assert complaints(reader) == []


def test_rest_costs_nothing(reader: PeeringEngine, whole: PeeringEngine) -> None:
    """Connected peers without a request take no more than engines with tiers do."""
    for engine in (reader, whole):
        assert engine.ask("cores", seconds=2.0) <= 0.1


def test_a_damaged_block_is_computed(reader: PeeringEngine, lender: PeeringEngine) -> None:
    """What changed after its checksum was taken is not used; what came before it is."""
    forget_host(reader)
    before = len(complaints(reader))
    cold = lender.run(1, 24)["tokens"]
    lender.ask("corrupt", nth=9)
    answer = reader.run(1, 24, peer=hint(lender))
    assert answer["tokens"] == cold
    assert answer["prompt_tokens_peer"] == 9 * BLOCK_TOKENS
    assert answer["computed"] == 15 * BLOCK_TOKENS + 5
    assert answer["failed_loads"] == 1
    [line] = complaints(reader)[before:]
    assert "1 of 24 blocks came damaged" in line
    assert lender.ask("lending")["lent"] == 0


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_a_peer_lost_while_it_is_read_costs_at_most_the_deadline(
    reader: PeeringEngine, lender: PeeringEngine, number: str
) -> None:
    """The rest is computed, from the deadline on at the latest; one line of the log; and while it
    rests it is not waited for again."""
    forget_host(reader)
    before = len(complaints(reader))
    cold = lender.run(2, 30)["tokens"]
    where = hint(lender)
    reader.ask("rests", first_s=20.0)
    lender.ask("die", number=number, at_get=3)
    alone_s = _first_token_s(reader.run(3, 30))
    answer = reader.run(2, 30, peer=where)
    assert answer["tokens"] == cold
    # What had come before is used, if it had.
    assert answer["prompt_tokens_peer"] in (0, 4 * BLOCK_TOKENS, 8 * BLOCK_TOKENS)
    assert answer["computed"] == 30 * BLOCK_TOKENS + 5 - answer["prompt_tokens_peer"]
    assert _first_token_s(answer) <= TIMEOUT_S + 2 * alone_s + 0.5
    [line] = complaints(reader)[before:]
    assert "is computed here" in line
    began = time.monotonic()
    again = reader.run(4, 1, peer=where)
    assert again["computed"] == BLOCK_TOKENS + 5
    assert time.monotonic() - began < TIMEOUT_S
    assert len(complaints(reader)) == before + 1


def test_a_peer_that_is_gone_or_stopped_before_is_a_miss(
    reader: PeeringEngine, lender: PeeringEngine
) -> None:
    """A stopped one by the hint's own deadline, a dead one at once."""
    reader.ask("rests", first_s=0.5)
    where = hint(lender, timeout_s=0.6)
    os.kill(lender.process.pid, signal.SIGSTOP)
    stopped = reader.run(5, 2, peer=where)
    assert stopped["computed"] == 2 * BLOCK_TOKENS + 5
    assert 0.6 <= _first_token_s(stopped) <= 1.5
    lender.kill()
    time.sleep(1.2)  # the first pauses are over
    gone = reader.run(6, 2, peer=where)
    assert gone["computed"] == 2 * BLOCK_TOKENS + 5
    assert _first_token_s(gone) <= 0.6


def test_a_reader_that_dies_leaves_nothing_lent(
    tiny_model: Path, folders: Path, whole: PeeringEngine
) -> None:
    """Its loans end with their time, and what it read can be evicted again."""
    whole.run(7, 12)
    doomed = PeeringEngine(tiny_model, folders / "doomed", SECTION)
    try:
        doomed.ask("die_reading")
        where = hint(whole)
        with pytest.raises(AssertionError, match="ended"):
            doomed.run(7, 12, peer=where)
        assert whole.ask("lending")["lent"] == 12
        await_that(lambda: whole.ask("lending")["lent"] == 0, "loans end", 2 * TIMEOUT_S)
        assert whole.ask("lending")["pinned"] == 0
    finally:
        doomed.kill()


def _first_token_s(answer: dict[str, Any]) -> float:
    return float(answer["at_s"][0])
