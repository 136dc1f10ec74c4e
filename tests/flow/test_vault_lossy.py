"""Blocks that are stored in a vault by a lossy codec, beside those that are not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kv.salt import lossy
from tests.flow.test_tiers import BLOCK_BYTES, same
from tests.flow.tiered_engine import BLOCK_TOKENS
from tests.flow.vault_engine import VaultEngine
from tests.vault.shard_process import MIB, client, shard
from workers.vault.pages import FORMAT

BLOCKS = 8
KEEP = {"codec": "int8"}
SALT = lossy(None, "int8", "gate")
TIERS = {
    "host": {"bytes": 40 * BLOCK_BYTES},
    "vault": {"shards": 1, "memory_bytes": 64 * MIB, "lossy": "int8"},
}


@pytest.fixture
def stored(tiny_model: Path, tmp_path: Path) -> Iterator[tuple[VaultEngine, Any, Any, Any]]:
    """A fresh engine whose vault has one prompt twice: exactly, and by int8 in a namespace of its
    own; with what a device hit answers, and the shard's books."""
    with shard(tmp_path, fingerprint=FORMAT) as one:
        where = {one.name: one.seat.address or ""}
        (tmp_path / "writer").mkdir()
        with VaultEngine(tiny_model, tmp_path / "writer", TIERS, where) as writer:
            writer.run(1, BLOCKS)
            hit = writer.run(1, BLOCKS)
            answer = writer.run(1, BLOCKS, salt=SALT, keep=KEEP)
            same(answer, hit)  # what was computed was not rounded
        (tmp_path / "reader").mkdir()
        with (
            client(one, fingerprint=FORMAT) as asking,
            VaultEngine(tiny_model, tmp_path / "reader", TIERS, where) as r,
        ):
            [books] = asking.stats(10.0).values()
            yield r, hit, answer, books


def test_lossy_and_exact_blocks_of_one_prompt_do_not_mix(
    stored: tuple[VaultEngine, Any, Any, Any],
) -> None:
    """Interleaved on one engine, the exact request has the answer of a device hit bit for bit, and
    the lossy one is rounded, and near it. Its blocks take less than a third of the room."""
    engine, hit, _, books = stored
    exact_bytes, lossy_bytes = (books.resident_bytes[name] for name in ("raw", "int8"))
    assert exact_bytes > 3 * lossy_bytes > 0
    rounded = engine.run(1, BLOCKS, salt=SALT, keep=KEEP)
    exact = engine.run(1, BLOCKS)
    for answer in (rounded, exact):
        assert answer["prompt_tokens_vault"] == BLOCKS * BLOCK_TOKENS
    same(exact, hit)
    assert rounded["logprobs"] != hit["logprobs"]
    assert rounded["logprobs"][0] == pytest.approx(hit["logprobs"][0], abs=0.1)
    # In the same order again, now from the device: still apart.
    again = engine.run(1, BLOCKS, salt=SALT, keep=KEEP)
    assert again["logprobs"] == rounded["logprobs"]
    same(engine.run(1, BLOCKS), hit)


def test_a_rounded_block_is_refused_by_who_did_not_ask_for_one(
    stored: tuple[VaultEngine, Any, Any, Any],
) -> None:
    """Even under its own name: it is computed instead, once, with one line of log."""
    engine, hit, _, _ = stored
    answer = engine.run(1, BLOCKS, salt=SALT)
    same(answer, hit)
    assert answer["prompt_tokens_vault"] == 0
