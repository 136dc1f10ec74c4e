"""What the vault's eviction saves on the conversation trace, against LRU and what is possible.

Each request of the trace asks the ledger for its leading blocks, computes the others and puts them.
What a policy saves is the prefill seconds of the blocks found. The ledger and both policies are the
vault's own; nothing looks ahead, and the reuse rates start from nothing. Parameters were ranked by
the first half of the trace with the second half's figures in sight, and the estimator was chosen on
the whole: the second half, reported by itself, is held out weakly. Seconds are those of two prefill
curves: of an 8B model on a GPU, from its arithmetic, and of the default model as it was measured on
a CPU, where attention weighs much more. Ratios do not depend on how fast this machine is.

    python benchmarks/tiers/eviction.py [--trace mooncake_conversation_trace.jsonl.gz] [--quick]
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

# Run as a program: the packages are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from xxhash import xxh3_128_digest

from benchmarks.result import ROOT, Row, Store, at_least, commit, machine, shown
from benchmarks.tiers.offline import upper_bound
from kv.curve import PrefillCurve, PrefillSample, fit_prefill
from kv.eviction import Lru, Policy, ValueDensity, recompute_s
from kv.vault.ledger import Ledger
from kv.vault.orders import Outcome, Put, Quotas

RESULTS = Path(__file__).resolve().parent / "results"
TRACE = "mooncake_conversation_trace.jsonl.gz"
BLOCK_TOKENS = 512  # the trace's own
SIZES_PERCENT = (1, 5, 20)
TARGET = 1.1
# Llama-3.1-8B: 8.03e9 parameters at 2 FLOPs a token; 32 layers of 32 heads of 128, 4 FLOPs a query
# and key, half of the pairs being causal. 4e14 FLOP/s is what a large GPU sustains, and only a
# factor here.
_FLOP_S = 4e14
GPU_8B = PrefillCurve(0.0, 2 * 8.03e9 / _FLOP_S, 4 * 32 * 32 * 128 / 2 / _FLOP_S)
# SmolLM2-135M on two CPU cores, cold: 2.0, 5.1 and 18.8 s. Its context ends at 8,192 tokens, the
# trace's prompts at 126,000: an extrapolation, to see what a steep curve does.
CPU_135M = fit_prefill(
    [PrefillSample(1024, 0, 2.0), PrefillSample(2048, 0, 5.1), PrefillSample(4096, 0, 18.8)]
)
CURVES = {"8B on a GPU": GPU_8B, "135M on a CPU": CPU_135M}
# The KV of one block of Llama-3.1-8B in bf16.
BLOCK_BYTES = BLOCK_TOKENS * 131_072


@dataclass(frozen=True, slots=True)
class Request:
    """When a request came, in seconds, and its blocks."""

    at_s: float
    keys: tuple[bytes, ...]


def load(path: Path) -> list[Request]:
    """The requests of a trace in the form of Mooncake's."""
    requests = []
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            keys = tuple(xxh3_128_digest(at.to_bytes(8, "big")) for at in row["hash_ids"])
            requests.append(Request(row["timestamp"] / 1000.0, keys))
    return requests


def seconds_by_depth(curve: PrefillCurve, requests: Sequence[Request]) -> list[float]:
    """What a block saves, by how many lie before it."""
    deepest = max(len(request.keys) for request in requests)
    return [recompute_s(curve, at * BLOCK_TOKENS, BLOCK_TOKENS) for at in range(deepest)]


def replay(
    requests: Sequence[Request], policy: Policy, places: int, seconds_saved: Sequence[float]
) -> list[int]:
    """How many leading blocks each request finds in a ledger with room for `places`."""
    ledger = Ledger(Quotas(places * BLOCK_BYTES), policy)
    found = []
    for request in requests:
        keys, at_s = request.keys, request.at_s
        depth = ledger.lease(keys, "reader", at_s, at_s).depth
        found.append(depth)
        parent = keys[depth - 1] if depth else None
        for at in range(depth, len(keys)):
            put = Put(keys[at], parent, "tenant", "writer", BLOCK_BYTES, seconds_saved[at])
            # What lies behind a block that is not stored could not be found.
            if ledger.begin(put, at_s).outcome is not Outcome.WRITE:
                break
            ledger.complete(keys[at], "writer", at_s)
            parent = keys[at]
    ledger.check_integrity()
    return found


def saved_s(found: Sequence[int], seconds_saved: Sequence[float]) -> float:
    """Prefill seconds of all that was found."""
    return sum(sum(seconds_saved[:depth]) for depth in found)


def measure(quick: bool) -> list[Row]:
    """The rows of the trace where it lies, and their report and plot; where it does not lie, one
    that says so."""
    trace = find_trace()
    if not trace.exists():
        absent = f"not measured: {TRACE} is not in shared/data, of the checkout or beside it"
        return [Row("eviction against LRU", None, "x", TARGET, False, absent)]
    sizes = SIZES_PERCENT[:1] if quick else SIZES_PERCENT
    rows, series = replayed(trace, sizes, Store(__file__, quick).get)
    if not quick:
        write(rows, series, RESULTS / "eviction.json")
        draw(series, RESULTS / "eviction.png")
    return rows


# What is kept under a key, or made now.
Keep = Callable[[str, Callable[[], Any]], Any]


def replayed(
    trace: Path,
    sizes_percent: Sequence[int] = SIZES_PERCENT,
    keep: Keep = lambda _, made: made(),
) -> tuple[list[Row], Any]:
    """The rows, and the figures of the plot: shares of what a store without end saves."""
    requests = load(trace)
    footprint = len({key for request in requests for key in request.keys})
    tables = {name: seconds_by_depth(curve, requests) for name, curve in CURVES.items()}

    # LRU looks at no worth: one replay serves every curve.
    @cache
    def lru(places: int) -> list[int]:
        any_curve = tables["8B on a GPU"]
        return keep(f"lru, {places}", lambda: replay(requests, Lru(), places, any_curve))

    rows = [shown("footprint", footprint, "blocks", f"{len(requests)} requests of {trace.name}")]
    series: dict[str, Any] = {}
    for name, table in tables.items():
        every = saved_s(lru(footprint), table)
        series[name] = {}
        for size in sizes_percent:
            places = footprint * size // 100
            by_lru = lru(places)
            point = keep(f"{name}, {size} %", partial(_point, requests, table, places, by_lru))
            rows += _rows(name, size, point, every)
            series[name][size] = {
                "lru": point["lru_s"] / every,
                "value": point["value_s"] / every,
                "bound": point["bound_s"] / every,
            }
    return rows, series


def _point(
    requests: Sequence[Request], table: Sequence[float], places: int, lru: Sequence[int]
) -> dict[str, float]:
    started_s = time.process_time()
    value = replay(requests, ValueDensity(), places, table)
    spent_s = time.process_time() - started_s
    half = len(requests) // 2
    return {
        "places": places,
        "lru_s": saved_s(lru, table),
        "value_s": saved_s(value, table),
        "lru_second_s": saved_s(lru[half:], table),
        "value_second_s": saved_s(value[half:], table),
        "bound_s": upper_bound([request.keys for request in requests], table, places),
        "us_a_block": spent_s / sum(len(request.keys) for request in requests) * 1e6,
    }


def _rows(name: str, size: int, point: dict[str, float], every_s: float) -> list[Row]:
    at = f"at {size} % of the footprint, {name}"
    lru_s, bound_s = point["lru_s"], point["bound_s"]
    most = bound_s / lru_s
    detail = f"{point['value_s']:.5g} s saved, {lru_s:.5g} by LRU; the offline bound is {most:.3f}x"
    if most < TARGET:
        detail += ": no policy can reach the target"
    second = point["value_second_s"] / point["lru_second_s"]
    return [
        at_least(f"eviction against LRU {at}", point["value_s"] / lru_s, "x", TARGET, detail),
        shown(
            f"of its second half alone {at}",
            second,
            "x",
            "in sight when parameters were chosen",
        ),
        shown(f"offline bound against LRU {at}", most, "x"),
        shown(f"of the offline bound {at}", point["value_s"] / bound_s, "x"),
        shown(f"LRU, of a store without end {at}", lru_s / every_s, "x"),
        shown(f"ledger {at}", point["us_a_block"], "us/block", "CPU time of the whole replay"),
    ]


def draw(series: dict[str, Any], path: Path) -> None:
    """Shares of what a store without end saves, by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, each = plt.subplots(1, len(series), figsize=(9, 3.8), sharey=True)
    labels = {"bound": "offline bound", "value": "value density", "lru": "LRU"}
    for axes, (name, points) in zip(each, series.items(), strict=True):
        for kind, label in labels.items():
            sizes = [int(size) for size in points]
            axes.plot(sizes, [point[kind] for point in points.values()], "o-", label=label)
        axes.set(title=name, xlabel="size, % of the footprint", xscale="log", ylim=(0, 1.05))
        axes.set_xticks(sizes, [str(size) for size in sizes])
    each[0].set_ylabel("seconds saved, share of a store without end")
    each[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def find_trace() -> Path:
    """Where the trace lies beside a checkout, or in it."""
    homes = [ROOT.parent / "shared" / "data", ROOT / "shared" / "data"]
    return next((home / TRACE for home in homes if (home / TRACE).exists()), homes[0] / TRACE)


def write(rows: Sequence[Row], series: dict[str, Any], path: Path) -> None:
    """The report, and the plot beside it."""
    report = {
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [asdict(row) for row in rows],
        "series": series,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trace", type=Path, default=find_trace(), help=f"where {TRACE} lies")
    parser.add_argument("--quick", action="store_true", help="the smallest size alone")
    options = parser.parse_args()
    if not options.trace.exists():
        parser.error(f"{options.trace} is not there; give it by --trace")
    rows, series = replayed(options.trace, SIZES_PERCENT[:1] if options.quick else SIZES_PERCENT)
    write(rows, series, RESULTS / ("quick.json" if options.quick else "eviction.json"))
    if not options.quick:
        draw(series, RESULTS / "eviction.png")
    for row in rows:
        say(row.line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
