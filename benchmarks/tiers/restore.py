"""Time to the first token of a prompt that was computed before, by where its KV is.

One engine at a time, with one compute thread, takes prompts of random tokens: each is computed
once (`cold`), and asked again with its KV in the engine's pages (`hit`), in the host tier (`host`)
and on disk alone (`disk`); a second process, started on the same files, takes them from disk too
(`fresh`). The three that can be repeated take turns. Files are out of the page cache before each
read from disk (`page_cache`), and the kernel's count of what the engine's process read from
storage is held against what the tier says that it loaded. Every visit must have taken each token
from where it is said to be, by the engine's counters, and have answered the same tokens.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.models import model
from benchmarks.result import Row, Store, at_least, at_most, shown, spread
from benchmarks.tiers import page_cache
from benchmarks.tiers.engine import ANSWER_TOKENS, MeasuredEngine
from tests.flow.tiered_engine import BLOCK_TOKENS, TAIL_TOKENS

TURNS = ("hit", "host", "disk")
LABELS = {
    "cold": "computed",
    "hit": "a device hit",
    "host": "from the host tier",
    "disk": "from disk",
    "fresh": "from disk, fresh process",
}
# By what is compared and prompt tokens: issue 4, "Speed".
TARGETS = {
    ("host", "hit", 4096): 1.3,
    ("disk", "hit", 4096): 2.0,
    ("host", "cold", 1024): 0.25,
    ("disk", "cold", 1024): 0.25,
    ("host", "cold", 4096): 0.1,
    ("disk", "cold", 4096): 0.1,
}


@dataclass(frozen=True, slots=True)
class Size:
    """Prompts in blocks, rounds of two processes each, and turns within one."""

    blocks: tuple[int, ...]
    rounds: int
    turns: int
    kv_bytes: int
    host_bytes: int
    disk_bytes: int


FULL = Size((32, 64, 128), 4, 3, 1 << 29, 1 << 30, 1 << 31)
QUICK = Size((8, 16), 1, 2, 1 << 24, 1 << 24, 1 << 25)


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
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        # Which prompt is the process's first changes from round to round.
        order = rotated(size.blocks, number)
        with start(folder, size, quick) as engine:
            done = visit(engine, folder, number, order, size.turns)
        with start(folder, size, quick) as engine:
            for blocks in order:
                page_cache.drop(block_files(folder))
                known = done["prompts"][str(blocks * BLOCK_TOKENS)]
                known["visits"]["fresh"] = [_visit(engine, "fresh", number, blocks, known)]
    return done | {"busy_cores": busy_cores}


def start(folder: Path, size: Size, quick: bool, disk: bool = True, **more: Any) -> MeasuredEngine:
    """An engine with tiers, warmed; its disk tier is below `folder`."""
    tiers: dict[str, Any] = {"host": {"bytes": size.host_bytes}}
    if disk:
        tiers["disk"] = {"path": str(folder / "disk"), "bytes": size.disk_bytes}
    longest = size.blocks[-1] * BLOCK_TOKENS + TAIL_TOKENS + ANSWER_TOKENS
    engine = MeasuredEngine(
        model(quick), folder, tiers, kv_bytes=size.kv_bytes, max_model_len=longest + 1, **more
    )
    try:
        engine.warm()
    except BaseException:
        engine.kill()
        raise
    return engine


def visit(
    engine: MeasuredEngine,
    folder: Path,
    number: int,
    order: Sequence[int],
    turns: int,
    kinds: Sequence[str] = TURNS,
) -> dict[str, Any]:
    """Each prompt cold, and then in turns of `kinds`."""
    prompts: dict[str, Any] = {}
    pages = 0
    for blocks in order:
        known: dict[str, Any] = {"visits": {}}
        known["visits"]["cold"] = [_visit(engine, "cold", number, blocks, known)]
        for turn in range(turns):
            for what in rotated(kinds, number + turn):
                pages += make_ready(engine, folder, what)
                taken = _visit(engine, what, number, blocks, known)
                known["visits"].setdefault(what, []).append(taken)
        prompts[str(blocks * BLOCK_TOKENS)] = known
    return {"prompts": prompts, "pages_dropped": pages}


def make_ready(engine: MeasuredEngine, folder: Path, what: str) -> int:
    """Leave the last prompt's KV where it is to be found; returns the pages that were dropped."""
    if what == "hit":
        return 0
    if not engine.ask("reset", host=what == "disk"):
        raise RuntimeError("the engine did not drop its blocks")
    return page_cache.drop(block_files(folder)) if what == "disk" else 0


def block_files(folder: Path) -> list[Path]:
    """What lies below the disk tier's folder, ours or another's."""
    return [path for path in (folder / "disk").rglob("*.*") if path.is_file()]


def _visit(
    engine: MeasuredEngine, what: str, number: int, blocks: int, known: dict[str, Any]
) -> dict[str, Any]:
    """One answer; `known` keeps what the first, cold one tells of all others."""
    before = engine.read_bytes()
    answer = engine.run(1000 * number + blocks, blocks, ANSWER_TOKENS)
    read_bytes = engine.read_bytes() - before
    if what == "cold":
        known["bytes"] = answer["host_stored_bytes"]
        known["tokens"] = answer["tokens"]
    check(what, answer, blocks, known, read_bytes)
    return {
        "ttft_s": round(answer["at_s"][0], 5),
        "read_bytes": read_bytes,
        "loaded_bytes": answer["disk_loaded_bytes"],
    }


def check(
    what: str, answer: dict[str, Any], blocks: int, known: dict[str, Any], read_bytes: int
) -> None:
    """Raises `RuntimeError` unless the prompt's KV came from where `what` says, in whole, and
    the answer is what the cold prompt's was."""
    all_tokens, all_bytes = blocks * BLOCK_TOKENS, known["bytes"]
    from_disk = what in ("disk", "fresh")
    expected = {
        "device": all_tokens if what == "hit" else 0,
        "prompt_tokens_host": all_tokens if what == "host" else 0,
        "prompt_tokens_disk": all_tokens if from_disk else 0,
        "host_loaded_bytes": all_bytes if what == "host" or from_disk else 0,
        "disk_loaded_bytes": all_bytes if from_disk else 0,
        "disk_stored_bytes": all_bytes if what == "cold" else 0,
        "computed": TAIL_TOKENS + (all_tokens if what == "cold" else 0),
        "tokens": known["tokens"],
    }
    wrong = {name: answer[name] for name in expected if answer[name] != expected[name]}
    if from_disk and read_bytes < all_bytes:
        wrong["read_bytes"] = read_bytes
    if wrong or all_bytes <= 0:
        wanted = {name: expected.get(name, all_bytes) for name in wrong}
        raise RuntimeError(f"{what} at {all_tokens} tokens: {wrong}, {wanted} wanted")


def rotated(things: Sequence[Any], by: int) -> list[Any]:
    """The same in another order, so that what drifts does not always meet the same one."""
    by %= len(things)
    return [*things[by:], *things[:by]]


# ------------------------------------------------------------------ from rounds to rows


def rows(rounds: Sequence[dict[str, Any]]) -> list[Row]:
    """TTFT of each kind, its ratios to a hit and to cold, and the proof of the reads."""
    found = []
    for tokens in sorted(map(int, rounds[0]["prompts"])):
        times = {what: _times(rounds, tokens, what) for what in LABELS}
        for what, label in LABELS.items():
            each = [value for values in times[what] for value in values]
            name = f"TTFT of {tokens} tokens, {label}"
            found.append(shown(name, 1000 * statistics.median(each), "ms", _spread_ms(each)))
        for other in ("hit", "cold"):
            for what in ("host", "disk", "fresh"):
                found.append(_ratio(times[what], times[other], what, other, tokens))
    return [*found, _reads(rounds)]


def _times(rounds: Sequence[dict[str, Any]], tokens: int, what: str) -> list[list[float]]:
    """Seconds, a list for each round."""
    visits = [each["prompts"][str(tokens)]["visits"][what] for each in rounds]
    return [[visit["ttft_s"] for visit in of_round] for of_round in visits]


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


def _reads(rounds: Sequence[dict[str, Any]]) -> Row:
    visits = [
        visit
        for each in rounds
        for prompt in each["prompts"].values()
        for what in ("disk", "fresh")
        for visit in prompt["visits"][what]
    ]
    least = min(visit["read_bytes"] / visit["loaded_bytes"] for visit in visits)
    busy = max(each["busy_cores"] for each in rounds)
    dropped = sum(each["pages_dropped"] for each in rounds)
    detail = (
        f"least of {len(visits)} restores; mincore found none of {dropped} pages in memory before; "
        f"tokens the same in every answer; others kept up to {busy:.2f} cores busy before a round"
    )
    return at_least("read from storage, of what the disk tier loaded", least, "x", 1.0, detail)


def _spread_ms(seconds: Sequence[float]) -> str:
    return spread([1000 * value for value in seconds], "ms")
