"""A disk that is full, slow or broken costs hits, never a wrong token and never a request."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.flow.test_tiers import BLOCK_BYTES, same, tiers
from tests.flow.tiered_engine import BLOCK_TOKENS, TieredEngine

HOST_BLOCKS = 32
TIMEOUT_S = 0.5


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TieredEngine]:
    """One whose requests wait half a second for a tier."""
    folder = tmp_path_factory.mktemp("faults")
    section = {**tiers(folder, HOST_BLOCKS), "load_timeout_s": TIMEOUT_S}
    with TieredEngine(tiny_model, folder, section) as engine:
        yield engine


@contextmanager
def broken(engine: TieredEngine, fault: str, seconds: float = 0.0) -> Iterator[None]:
    engine.ask("break_disk", fault=fault, seconds=seconds)
    try:
        yield
    finally:
        engine.ask("mend_disk")


def in_tiers(engine: TieredEngine, seed: int, blocks: int) -> dict[str, Any]:
    """A device hit's answer to a prompt that is then on disk alone."""
    engine.run(seed, blocks)
    hit = engine.run(seed, blocks)
    assert hit["device"] == blocks * BLOCK_TOKENS
    assert engine.ask("reset", host=True)
    return hit


def test_a_full_disk_costs_what_it_cannot_store(engine: TieredEngine) -> None:
    """Answers stay right and host memory serves; one line says so. Once there is room the disk
    stores again."""
    lines = engine.log.read_text().count("not stored")
    with broken(engine, "full"):
        cold = [engine.run(seed, 6) for seed in (10, 11)]
        assert all(answer["disk_stored_bytes"] == 0 for answer in cold)
        assert engine.ask("reset", host=False)
        restored = engine.run(10, 6)
        assert restored["tokens"] == cold[0]["tokens"]
        assert restored["prompt_tokens_host"] == 6 * BLOCK_TOKENS
        assert engine.ask("reset", host=True)
        again = engine.run(11, 6)
        assert again["tokens"] == cold[1]["tokens"]
        assert again["computed"] == 6 * BLOCK_TOKENS + 5
    assert engine.log.read_text().count("not stored") == lines + 1
    assert engine.run(12, 6)["disk_stored_bytes"] == 6 * BLOCK_BYTES


def test_a_block_that_is_found_and_cannot_be_read_is_computed(engine: TieredEngine) -> None:
    """The tier answers that it has it, and fails: the request is not held up, and later ones find
    what was computed."""
    hit = in_tiers(engine, 20, 8)
    with broken(engine, "unreadable"):
        answer = engine.run(20, 8)
    assert answer["tokens"] == hit["tokens"]
    assert answer["computed"] == 8 * BLOCK_TOKENS + 5
    assert answer["failed_loads"] == 1
    assert engine.ask("reset", host=True)
    again = engine.run(20, 8)
    assert again["tokens"] == hit["tokens"]
    assert again["prompt_tokens_disk"] == 8 * BLOCK_TOKENS


def test_a_load_that_takes_too_long_is_not_waited_for(engine: TieredEngine) -> None:
    """A request computes what has not come when its time is up; the block that comes later serves
    the next one."""
    hit = in_tiers(engine, 30, 8)
    with broken(engine, "slow", seconds=60):
        answer = engine.run(30, 8, settle=False)
        assert answer["tokens"] == hit["tokens"]
        assert answer["computed"] == 8 * BLOCK_TOKENS + 5
        assert TIMEOUT_S <= answer["at_s"][0] < 10
    assert "a load took over 0.5 s" in engine.log.read_text()
    assert engine.ask("reset", host=False)
    later = engine.run(30, 8)
    same(later, hit)
    assert later["prompt_tokens_host"] == 8 * BLOCK_TOKENS


def test_a_request_says_how_long_it_waits(engine: TieredEngine) -> None:
    """Its own deadline takes the place of the configured one."""
    hit = in_tiers(engine, 40, 4)
    with broken(engine, "slow", seconds=2 * TIMEOUT_S):
        answer = engine.run(40, 4, hints={"reach_tokens": None, "deadline_s": 60.0})
    same(answer, hit)
    assert answer["prompt_tokens_disk"] == 4 * BLOCK_TOKENS
    assert answer["at_s"][0] >= 2 * TIMEOUT_S


def test_a_disk_that_hangs_leaves_host_memory_to_new_blocks(engine: TieredEngine) -> None:
    """Blocks that wait to be stored take half of it at most: the rest goes on serving."""
    with broken(engine, "slow", seconds=600):
        cold = [engine.run(seed, 8, settle=False) for seed in range(50, 58)]
        assert engine.run(57, 8, settle=False)["device"] == 8 * BLOCK_TOKENS
        assert engine.ask("reset", host=False)
        restored = engine.run(57, 8, settle=False)
        assert restored["tokens"] == cold[-1]["tokens"]
        assert restored["prompt_tokens_host"] == 8 * BLOCK_TOKENS
    assert engine.ask("reset", host=True)
    assert [engine.run(seed, 8)["prompt_tokens_disk"] for seed in (50, 57)] == [8 * BLOCK_TOKENS, 0]


def test_encrypted_blocks_come_back_under_their_key_alone(tiny_model: Path, tmp_path: Path) -> None:
    """A fresh process with the key answers as a device hit does; one with another key, or without,
    computes."""
    keys = {}
    for name in ("one", "other"):
        keys[name] = tmp_path / name
        keys[name].write_bytes(name.encode().ljust(32))
        keys[name].chmod(0o600)

    def section(key: Path | None) -> dict[str, Any]:
        both = tiers(tmp_path)
        both["disk"]["key_file"] = None if key is None else str(key)
        return both

    with TieredEngine(tiny_model, tmp_path, section(keys["one"])) as engine:
        hit = in_tiers(engine, 1, 8)
    with TieredEngine(tiny_model, tmp_path, section(keys["one"])) as engine:
        answer = engine.run(1, 8)
        same(answer, hit)
        assert answer["prompt_tokens_disk"] == 8 * BLOCK_TOKENS
    with TieredEngine(tiny_model, tmp_path, section(keys["other"])) as engine:
        answer = engine.run(1, 8)
        assert answer["tokens"] == hit["tokens"]
        assert answer["prompt_tokens_disk"] == answer["failed_loads"] == 0
