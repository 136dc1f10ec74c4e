"""Peers beside our tiers: vLLM's own `fs` tier, and tierKV's codec.

vLLM's `fs` tier restores the same prompts into the same engine, with our worker for CPU engines
(vLLM has none) and our manager above it. It checks no sums and has no budget. Both read with
O_DIRECT where they can, ours only what the page cache does not have: it is emptied first. Engines
of both take turns, one at a time. tierKV's codec encodes the default model's KV in tierKV's own
layout, in an environment of its own (`peers_tierkv`).
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.result import Row, Store, shown, spread
from benchmarks.tiers import peers_tierkv, restore

SYSTEMS = {"ours": "our disk tier", "fs": "vLLM's fs tier"}
# A hit beside each restore, so that the two engines can be told from their tiers.
KINDS = ("hit", "disk")
FULL = replace(restore.FULL, rounds=2, turns=3)
QUICK = replace(restore.QUICK, rounds=1, turns=2)


def measure(quick: bool) -> list[Row]:
    """Rows of both peers; what was measured at this commit is not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    for number in range(size.rounds):
        for name in restore.rotated(list(SYSTEMS), number):
            key = f"{name}-{number}"
            found[name].append(store.get(key, partial(_round, name, number, size, quick)))
    return restore_rows(found) + peers_tierkv.measured(store, quick)


def _round(name: str, number: int, size: restore.Size, quick: bool) -> dict[str, Any]:
    print(f"    {SYSTEMS[name]}, round {number + 1} of {size.rounds}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as where:
        folder = Path(where)
        fs = {"type": "fs", "root_dir": str(folder / "disk")}
        more = {} if name == "ours" else {"secondary_tiers": [fs]}
        with restore.start(folder, size, quick, disk=name == "ours", **more) as engine:
            order = restore.rotated(size.blocks, number)
            return restore.visit(engine, folder, number, order, size.turns, KINDS)


def restore_rows(found: dict[str, Sequence[dict[str, Any]]]) -> list[Row]:
    """TTFT of restores by either tier, and ours against vLLM's."""
    rows = []
    for tokens in sorted(map(int, found["ours"][0]["prompts"])):
        times = {name: _times(rounds, tokens, "disk") for name, rounds in found.items()}
        for name, label in SYSTEMS.items():
            hit_s = statistics.median(_times(found[name], tokens, "hit"))
            detail = f"{spread([1000 * s for s in times[name]], 'ms')}; a hit {1000 * hit_s:.0f} ms"
            median_ms = 1000 * statistics.median(times[name])
            rows.append(shown(f"TTFT of {tokens} tokens, {label}", median_ms, "ms", detail))
        ratio = statistics.median(times["ours"]) / statistics.median(times["fs"])
        detail = "with a checksum and a budget, against neither"
        rows.append(shown(f"our disk tier against vLLM's fs tier at {tokens}", ratio, "x", detail))
    return rows


def _times(rounds: Sequence[dict[str, Any]], tokens: int, what: str) -> list[float]:
    visits = [each["prompts"][str(tokens)]["visits"][what] for each in rounds]
    return [visit["ttft_s"] for of_round in visits for visit in of_round]
