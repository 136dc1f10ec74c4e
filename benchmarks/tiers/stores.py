"""What storing costs those who decode: running streams with tiers on, against off.

Two engines of the same options, one with a host tier and a disk tier, take turns; the one that is
not measured stands still. In a turn several prompts come at once and are answered at length: gaps
between tokens count once every stream has begun and until the first ends, while blocks of the
prompts are still on their way to disk and those of the answers follow.
"""

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.models import model
from benchmarks.processes import family, pause
from benchmarks.result import Row, Store, at_most, quantile, shown, spread
from benchmarks.tiers.engine import MeasuredEngine
from tests.flow.tiered_engine import BLOCK_TOKENS, TAIL_TOKENS

NAMES = ("on", "off")
TARGET = 1.05


@dataclass(frozen=True, slots=True)
class Size:
    """Streams, blocks of their prompts and tokens of their answers; turns of each engine."""

    streams: int
    blocks: int
    tokens: int
    turns: int
    kv_bytes: int
    host_bytes: int
    disk_bytes: int


FULL = Size(8, 8, 160, 6, 1 << 29, 1 << 30, 1 << 31)
QUICK = Size(4, 4, 64, 1, 1 << 24, 1 << 24, 1 << 25)


def measure(quick: bool) -> list[Row]:
    """Rows of this part; turns that were measured at this commit are not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    if any(_key(name, turn) not in store for name in NAMES for turn in range(size.turns)):
        with _engines(size, quick) as engines:
            for turn, name in _in_turns(size.turns):
                other = engines[NAMES[1 - NAMES.index(name)]]
                with pause(family(other.process.pid)):
                    store.get(_key(name, turn), partial(_turn, engines[name], turn, size))
    return rows(*([store.kept(_key(n, turn)) for turn in range(size.turns)] for n in NAMES))


def _key(name: str, turn: int) -> str:
    return f"{name}-{turn}"


def _in_turns(turns: int) -> Iterator[tuple[int, str]]:
    """First one, then the other comes first: what drifts does not always meet the same."""
    for turn in range(turns):
        for name in NAMES if turn % 2 == 0 else NAMES[::-1]:
            yield turn, name


@contextlib.contextmanager
def _engines(size: Size, quick: bool) -> Iterator[dict[str, MeasuredEngine]]:
    longest = size.blocks * BLOCK_TOKENS + TAIL_TOKENS + size.tokens
    options = {"kv_bytes": size.kv_bytes, "max_model_len": longest + 1}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        tiers = {
            "host": {"bytes": size.host_bytes},
            "disk": {"path": str(folder / "disk"), "bytes": size.disk_bytes},
        }
        with (
            MeasuredEngine(model(quick), folder / "on", tiers, **options) as on,
            MeasuredEngine(model(quick), folder / "off", {}, **options) as off,
        ):
            yield {"on": on, "off": off}


def _turn(engine: MeasuredEngine, turn: int, size: Size) -> dict[str, Any]:
    engine.warm()
    seeds = [10_000 + size.streams * turn + stream for stream in range(size.streams)]
    answer = engine.streams(seeds, size.blocks, size.tokens)
    kept = ("at_s", "host_stored_bytes", "disk_stored_bytes", "prompt_tokens_computed")
    return {name: answer[name] for name in kept}


# ------------------------------------------------------------------ from turns to rows


def together(at_s: Sequence[Sequence[float]]) -> list[float]:
    """Gaps that begin when every stream has begun, and end before one has ended."""
    began, ended = max(times[0] for times in at_s), min(times[-1] for times in at_s)
    return [
        later - earlier
        for times in at_s
        for earlier, later in itertools.pairwise(times)
        if began <= earlier and later <= ended
    ]


def rows(on: Sequence[dict[str, Any]], off: Sequence[dict[str, Any]]) -> list[Row]:
    """Ratios turn by turn. Raises `RuntimeError` where the two did not do the same, or nothing was
    stored."""
    for a, b in zip(on, off, strict=True):
        _check(a, b)
    pairs = [(together(a["at_s"]), together(b["at_s"])) for a, b in zip(on, off, strict=True)]
    found = [_gaps(pairs, 0.5, TARGET), _gaps(pairs, 0.99, None)]
    began = [[max(t[0] for t in turn["at_s"]) for turn in turns] for turns in (on, off)]
    ratios = [a / b for a, b in zip(*began, strict=True)]
    detail = f"{spread(ratios)}; off {statistics.median(began[1]):.2f} s"
    found.append(
        shown("until all have begun, tiers on against off", statistics.median(ratios), "x", detail)
    )
    stored = sum(turn["disk_stored_bytes"] for turn in on) / len(on) / 1e6
    return [*found, shown("stored to disk in a turn", stored, "MB", "and to the host tier")]


def _check(on: dict[str, Any], off: dict[str, Any]) -> None:
    if on["prompt_tokens_computed"] != off["prompt_tokens_computed"]:
        raise RuntimeError("one of the two engines had a part of a prompt already")
    if not on["host_stored_bytes"] == on["disk_stored_bytes"] > 0 or off["host_stored_bytes"]:
        raise RuntimeError(
            f"{on['host_stored_bytes']} and {on['disk_stored_bytes']} bytes stored with tiers on, "
            f"{off['host_stored_bytes']} with tiers off"
        )


def _gaps(pairs: Sequence[tuple[list[float], list[float]]], q: float, target: float | None) -> Row:
    ratios = [quantile(on, q) / quantile(off, q) for on, off in pairs]
    ms = [1000 * statistics.median(quantile(pair[which], q) for pair in pairs) for which in (0, 1)]
    detail = f"of each turn: {spread(ratios)}; on {ms[0]:.1f}, off {ms[1]:.1f} ms"
    name = f"p{100 * q:g} ITL of running streams, tiers on against off"
    if target is None:
        return shown(name, statistics.median(ratios), "x", detail)
    return at_most(name, statistics.median(ratios), "x", target, detail)
