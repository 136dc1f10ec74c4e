"""Time to the first token of a prompt whose KV only a vault has: exactly, and by int8.

As `restore`, with one engine and a shard in a process of its own on the same machine. Each prompt
is computed twice, the second time for the lossy namespace; then it is asked for in turns with its
KV in the engine's pages (`hit`), in the vault as it was computed (`raw`) and in the vault by int8
(`int8`). Before a turn from the vault the engine's pages and host tier are emptied. Every visit
must have taken every full block from where it is said to be, by the engine's counters; `raw` must
answer what the cold prompt answered, `int8` always the same.
"""

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.models import model
from benchmarks.result import Row, Store, at_most, shown, spread
from benchmarks.tiers.engine import ANSWER_TOKENS, WARM_BLOCKS, WARM_SEED
from benchmarks.tiers.restore import FULL, QUICK, Size, rotated
from kv.salt import lossy
from tests.flow.tiered_engine import BLOCK_TOKENS, TAIL_TOKENS
from tests.flow.vault_engine import VaultEngine
from tests.vault.shard_process import shard
from workers.vault.pages import FORMAT

TURNS = ("hit", "raw", "int8")
LABELS = {
    "cold": "computed",
    "hit": "a device hit",
    "raw": "from the vault",
    "int8": "from the vault by int8",
}
# By what is compared and prompt tokens: issue 4, "Speed".
TARGETS = {
    ("raw", "hit", 4096): 2.0,
    ("int8", "hit", 4096): 2.5,
    ("raw", "cold", 1024): 0.25,
    ("int8", "cold", 1024): 0.25,
    ("raw", "cold", 4096): 0.1,
    ("int8", "cold", 4096): 0.1,
}
LOSSY: dict[str, Any] = {"salt": lossy(None, "int8", "benchmark"), "keep": {"codec": "int8"}}


def measure(quick: bool) -> list[Row]:
    """Rows of this part; rounds that were measured at this commit are not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    keys = [f"round-{number}" for number in range(size.rounds)]
    for number, key in enumerate(keys):
        store.get(key, partial(_round, number, size, quick))
    return rows([store.kept(key) for key in keys])


# ------------------------------------------------------------------ one round


def _round(number: int, size: Size, quick: bool) -> dict[str, Any]:
    print(f"    round {number + 1} of {size.rounds}", flush=True)
    busy_cores = psutil.cpu_percent(2.0) / 100 * (psutil.cpu_count() or 1)
    tiers = {
        "host": {"bytes": size.host_bytes},
        "vault": {"shards": 1, "memory_bytes": size.host_bytes, "lossy": "int8"},
    }
    longest = size.blocks[-1] * BLOCK_TOKENS + TAIL_TOKENS + ANSWER_TOKENS
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        memory_bytes = size.host_bytes
        with (
            shard(folder, fingerprint=FORMAT, memory_bytes=memory_bytes) as one,
            VaultEngine(
                model(quick),
                folder / "engine",
                tiers,
                {one.name: one.seat.address or ""},
                kv_bytes=size.kv_bytes,
                max_model_len=longest + 1,
            ) as engine,
        ):
            _warm(engine)
            prompts = {
                str(blocks * BLOCK_TOKENS): _visits(engine, number, blocks, size.turns)
                for blocks in rotated(size.blocks, number)
            }
    return {"prompts": prompts, "busy_cores": busy_cores}


def _warm(engine: VaultEngine) -> None:
    """A prompt of its own, each way: what a process does once has been done."""
    for more in ({}, LOSSY):
        engine.run(WARM_SEED, WARM_BLOCKS, **more)
        _empty(engine)
        engine.run(WARM_SEED, WARM_BLOCKS, **more)


def _empty(engine: VaultEngine) -> None:
    if not engine.ask("reset", host=True):
        raise RuntimeError("the engine did not drop its blocks")


def _visits(engine: VaultEngine, number: int, blocks: int, turns: int) -> dict[str, Any]:
    """One prompt: computed, computed for the lossy namespace, and then asked for in turns."""
    seed = 1000 * number + blocks
    answers: dict[str, Any] = {}

    def visit(what: str) -> float:
        more = LOSSY if what in ("cold int8", "int8") else {}
        answer = engine.run(seed, blocks, ANSWER_TOKENS, **more)
        first = "cold" if what in ("hit", "raw") else what
        check(what, answer, blocks, answers.setdefault(first, answer))
        return round(float(answer["at_s"][0]), 5)

    cold = [visit("cold")]
    visit("cold int8")
    times: dict[str, list[float]] = {"cold": cold}
    for turn in range(turns):
        for what in rotated(TURNS, number + turn):
            if what == "hit":
                # Another turn may have left them in the host tier alone.
                engine.run(seed, blocks, ANSWER_TOKENS)
            else:
                _empty(engine)
            times.setdefault(what, []).append(visit(what))
    return times


def check(what: str, answer: dict[str, Any], blocks: int, known: dict[str, Any]) -> None:
    """Raises `RuntimeError` unless the prompt's KV came from where `what` says, in whole, and
    its tokens are those of `known`."""
    all_tokens, cold = blocks * BLOCK_TOKENS, what.startswith("cold")
    expected = {
        "device": all_tokens if what == "hit" else 0,
        "prompt_tokens_host": 0,
        "prompt_tokens_vault": all_tokens if what in ("raw", "int8") else 0,
        "computed": TAIL_TOKENS + (all_tokens if cold else 0),
        "failed_loads": 0,
        "tokens": known["tokens"],
    }
    wrong = {name: answer[name] for name in expected if answer[name] != expected[name]}
    if wrong:
        wanted = {name: expected[name] for name in wrong}
        raise RuntimeError(f"{what} at {all_tokens} tokens: {wrong}, {wanted} wanted")


# ------------------------------------------------------------------ from rounds to rows


def rows(rounds: Sequence[dict[str, Any]]) -> list[Row]:
    """TTFT of each kind, and its ratios to a hit and to cold."""
    found = []
    for tokens in sorted(map(int, rounds[0]["prompts"])):
        times = {what: [each["prompts"][str(tokens)][what] for each in rounds] for what in LABELS}
        for what, label in LABELS.items():
            each = [1000 * value for values in times[what] for value in values]
            name = f"TTFT of {tokens} tokens, {label} (vault's engine)"
            found.append(shown(name, statistics.median(each), "ms", spread(each, "ms")))
        for other in ("hit", "cold"):
            for what in ("raw", "int8"):
                found.append(_ratio(times[what], times[other], what, other, tokens))
    return found


def _ratio(
    above: list[list[float]], below: list[list[float]], what: str, other: str, tokens: int
) -> Row:
    ratios = [
        statistics.median(a) / statistics.median(b) for a, b in zip(above, below, strict=True)
    ]
    name = f"{LABELS[what]}, against {LABELS[other]} at {tokens}"
    detail = f"of each round: {spread(ratios)}"
    target = TARGETS.get((what, other, tokens))
    if target is None:
        return shown(name, statistics.median(ratios), "x", detail)
    return at_most(name, statistics.median(ratios), "x", target, detail)
