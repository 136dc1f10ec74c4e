"""What an engine tells of its tiers, and that it takes no more from them than a plan lets it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.tiered_engine import BLOCK_TOKENS, TieredEngine

BLOCK_BYTES = 32_768
BLOCKS = 12
FULL = BLOCKS * BLOCK_TOKENS


def tiers(folder: Path) -> dict[str, Any]:
    disk = {"path": str(folder / "disk"), "bytes": 1000 * (BLOCK_BYTES + 4096)}
    return {"host": {"bytes": 256 * BLOCK_BYTES}, "disk": disk}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hints")


@pytest.fixture(scope="module")
def cold(tiny_model: Path, folder: Path) -> Iterator[tuple[TieredEngine, dict[str, Any]]]:
    """An engine with host and disk tiers, and what it answered to a prompt before it had tiers."""
    with TieredEngine(tiny_model, folder / "plain", {}) as plain:
        answer = plain.run(1, BLOCKS)
    with TieredEngine(tiny_model, folder, tiers(folder)) as engine:
        assert engine.run(1, BLOCKS)["tokens"] == answer["tokens"]
        yield engine, answer


def test_each_tier_is_told_as_blocks_come_and_go(
    cold: tuple[TieredEngine, dict[str, Any]],
) -> None:
    """All are in all tiers; those that leave one stay in the others."""
    engine, _ = cold
    full = [BLOCKS, BLOCKS, 0]
    assert engine.ask("told") == {"device": full, "host": full, "disk": full}
    assert engine.ask("reset", host=False)
    engine.run(2, 1)
    more = [BLOCKS + 1, BLOCKS + 1, 0]
    assert engine.ask("told") == {"device": [1, 1, 0], "host": more, "disk": more}
    assert engine.ask("reset", host=True)
    engine.run(3, 1)
    more = [BLOCKS + 2, BLOCKS + 2, 0]
    assert engine.ask("told") == {"device": [1, 1, 0], "host": [1, 1, 0], "disk": more}


@pytest.mark.parametrize(
    ("hints", "loaded", "source"),
    [
        ({}, 0, "host"),
        ({"reach_tokens": 5 * BLOCK_TOKENS, "tiers": ["host"]}, 5 * BLOCK_TOKENS, "host"),
        ({"reach_tokens": FULL, "tiers": ["host"]}, FULL, "host"),
        ({"reach_tokens": None, "tiers": []}, FULL, "host"),
    ],
    ids=["compute", "a part", "all", "whatever there is"],
)
def test_a_request_loads_what_its_plan_lets_it(
    cold: tuple[TieredEngine, dict[str, Any]], hints: dict[str, Any], loaded: int, source: str
) -> None:
    """What it may not load it computes, though host memory has it; the tokens are a plain
    engine's, and they are counted by where they came from."""
    engine, answer = cold
    engine.run(1, BLOCKS)
    assert engine.ask("reset", host=False)
    again = engine.run(1, BLOCKS, hints=hints)
    assert again["tokens"] == answer["tokens"]
    assert again["sources"].get(source, 0) == again[f"prompt_tokens_{source}"] == loaded
    assert again["computed"] == FULL + 5 - loaded
    assert again["host_loaded_bytes"] == loaded // BLOCK_TOKENS * BLOCK_BYTES


@pytest.mark.parametrize("here", [2, 7])
def test_a_reach_is_counted_from_the_start_of_the_prompt(
    cold: tuple[TieredEngine, dict[str, Any]], here: int
) -> None:
    """Whether the device lost what the plan took for a hit, or has more of it by now: what the plan
    computes is not loaded, and a hit is not loaded twice."""
    engine, answer = cold
    engine.run(1, BLOCKS)
    assert engine.ask("reset", host=False)
    engine.ask("run", seed=1, blocks=BLOCKS, n=1, first_blocks=here)
    again = engine.run(1, BLOCKS, hints={"reach_tokens": 5 * BLOCK_TOKENS})
    assert again["tokens"] == answer["tokens"]
    assert again["device"] == here * BLOCK_TOKENS
    assert again["sources"].get("host", 0) == max(0, 5 - here) * BLOCK_TOKENS


def test_a_tier_that_a_plan_does_not_name_is_not_read(
    cold: tuple[TieredEngine, dict[str, Any]],
) -> None:
    """With host memory alone allowed, files are left alone; with both they are read."""
    engine, answer = cold
    engine.run(1, BLOCKS)
    assert engine.ask("reset", host=True)
    host = engine.run(1, BLOCKS, hints={"reach_tokens": FULL, "tiers": ["host"]})
    assert host["tokens"] == answer["tokens"]
    assert host["computed"] == FULL + 5
    assert host["disk_loaded_bytes"] == 0
    assert engine.ask("reset", host=True)
    both = engine.run(1, BLOCKS, hints={"reach_tokens": FULL, "tiers": ["host", "disk"]})
    assert both["tokens"] == answer["tokens"]
    assert both["sources"] == {"disk": FULL, "computed": 5}


def test_what_is_late_is_computed(cold: tuple[TieredEngine, dict[str, Any]]) -> None:
    """Blocks that are still on their way from disk at the deadline are a miss: the prompt is
    computed long before they come, to the same tokens; the next finds them in host memory."""
    engine, answer = cold
    engine.run(1, BLOCKS)
    assert engine.ask("reset", host=True)
    hints = {"reach_tokens": FULL, "tiers": ["host", "disk"], "deadline_s": 0.1}
    engine.ask("slow_disk", seconds=0.5)
    try:
        late = engine.run(1, BLOCKS, hints=hints)
    finally:
        engine.ask("slow_disk", seconds=0.0)
    assert late["tokens"] == answer["tokens"]
    assert late["sources"] == {"computed": FULL + 5}
    assert 0.1 < late["at_s"][0] < 0.5 * BLOCKS / 2
    assert late["disk_loaded_bytes"] == BLOCKS * BLOCK_BYTES
    assert engine.ask("reset", host=False)
    soon = engine.run(1, BLOCKS, hints=hints)
    assert soon["tokens"] == answer["tokens"]
    assert soon["sources"] == {"host": FULL, "computed": 5}


def test_what_loads_took_is_what_the_router_is_told(
    cold: tuple[TieredEngine, dict[str, Any]],
) -> None:
    """Both tiers have seen what was loaded from them; a disk costs more than memory."""
    engine, _ = cold
    costs = engine.ask("costs")
    seconds = {tier: cost[0] + cost[1] * BLOCKS * BLOCK_BYTES for tier, cost in costs.items()}
    assert 0 < seconds["host"] < seconds["disk"]
    assert costs["host"][2] >= 1
    assert costs["disk"][2] >= 1


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_load_is_told_apart_from_computing(
    cold: tuple[TieredEngine, dict[str, Any]], tier: str
) -> None:
    """Seconds until what tiers give is in, its bytes, and seconds to compute the rest; all of it
    before the first token."""
    engine, _ = cold
    computed = engine.run(1, BLOCKS, hints={})["spent"]
    assert (computed["loading_s"], computed["loaded_bytes"]) == (0.0, 0)
    assert engine.ask("reset", host=tier == "disk")
    answer = engine.run(1, BLOCKS, hints={"reach_tokens": None})
    assert answer["sources"][tier] == FULL
    spent = answer["spent"]
    assert spent["loaded_bytes"] == BLOCKS * BLOCK_BYTES
    assert spent["loading_s"] > 0.0
    assert spent["computing_s"] > 0.0
    told_s = spent["queued_s"] + spent["loading_s"] + spent["computing_s"]
    assert told_s <= answer["at_s"][0]
    assert told_s > 0.5 * answer["at_s"][0]


def test_files_of_an_earlier_process_are_named_by_the_first_that_asks(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A new engine counts them; who computes or loads their prompt makes them known."""
    with TieredEngine(tiny_model, tmp_path, tiers(tmp_path)) as engine:
        first = engine.run(1, BLOCKS)
        engine.run(2, 2)
    with TieredEngine(tiny_model, tmp_path, tiers(tmp_path)) as engine:
        assert engine.ask("told")["disk"] == [BLOCKS + 2, 0, BLOCKS + 2]
        loaded = engine.run(1, BLOCKS, hints={"reach_tokens": None})
        assert loaded["tokens"] == first["tokens"]
        assert loaded["sources"]["disk"] == FULL
        assert engine.ask("told")["disk"] == [BLOCKS + 2, BLOCKS, 2]
        assert engine.ask("told")["host"] == [BLOCKS, BLOCKS, 0]
        engine.run(2, 2, hints={})
        assert engine.ask("told")["disk"] == [BLOCKS + 2, BLOCKS + 2, 0]
        engine.ask("forget")
        assert engine.ask("told") == {tier: [0, 0, 0] for tier in ("device", "host", "disk")}
