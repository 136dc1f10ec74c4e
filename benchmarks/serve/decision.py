"""What routing one request costs at ten million blocks: part of `make bench-serve`.

Two processes share one core and take turns: the router's own code (`decision_ours.py`) and Dynamo's
in-process SelectionService (`decision_dynamo.py`), on the same prompts, holders and churn
(`decision_load.py`). Each holds all of its blocks all the time. A decision is all between the token
list and the plan: packing, hashing, lookup, the snapshot with what changed since the last one,
pricing. Alone: `python benchmarks/serve/decision.py [--quick]`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
RESULT = RESULTS / "decision.json"
DYNAMO = "ai-dynamo-runtime==1.6.1"
DYNAMO_NEEDS = (DYNAMO, "pyzmq", "msgspec", "xxhash", "psutil")
CORE = max(os.sched_getaffinity(0))
MILLION = 1_000_000
# Decisions that only warm caches and branch predictors, before any are counted.
WARM_UP = 500
# A fill of 30 M blocks on a busy machine takes minutes.
ANSWER_S = 900.0
# What the planner may take where it searches split points.
SPLIT_US = 400.0
KINDS = {
    "": "",
    "scattered": ", holders at depths of their own",
    "tiered": ", split points searched",
}


# Blocks, replicas, and the kind of load (decision_load.py).
Point = tuple[int, int, str]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    main: Point
    growth: tuple[Point, ...]
    rounds: int
    decisions: int


FULL = Scale(
    main=(10 * MILLION, 64, ""),
    growth=(
        (MILLION, 64, ""),
        (3 * MILLION, 64, ""),
        (30 * MILLION, 64, ""),
        (10 * MILLION, 8, ""),
        (10 * MILLION, 512, ""),
        (10 * MILLION, 64, "scattered"),
        (10 * MILLION, 64, "tiered"),
    ),
    rounds=5,
    decisions=4000,
)
QUICK = Scale(
    main=(MILLION, 64, ""),
    growth=((MILLION // 4, 8, ""), (MILLION // 4, 64, "scattered"), (MILLION // 4, 64, "tiered")),
    rounds=3,
    decisions=800,
)


@dataclass(frozen=True)
class Row:
    """One figure; `target` is None where none was asked for, `value` where it was not measured."""

    name: str
    value: float | None
    unit: str
    target: float | None
    ok: bool
    detail: str = ""


class Absent(Exception):
    """Something cannot be measured here; its text says why."""


class Worker:
    """A process of one side, asked by lines of JSON."""

    def __init__(self, command: list[str]) -> None:
        # A session of its own, which Linux weighs against others (decision_load.prefer_this).
        self._process = subprocess.Popen(
            command,
            cwd=HERE,
            env={**os.environ, "DYN_LOG": "error", "PYTHONPATH": str(HERE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, do: str, **order: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            code = self._process.poll()
            raise Absent(f"`{do}` ended with exit code {code}") from error
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def working(python: str, script: str, point: Point) -> Iterator[Worker]:
    """A process with a catalogue of `point` to fill."""
    blocks, replicas, kind = point
    command = [python, str(HERE / script), str(blocks), str(replicas), str(CORE)]
    worker = Worker([*command, *([kind] if kind else [])])
    try:
        yield worker
    finally:
        worker.close()


def measure(quick: bool, dynamo_python: str | None = None) -> list[Row]:
    """Every row of the decision; writes them with the raw series, and draws the plots.

    A quick run writes a file of its own and draws nothing.
    """
    scale = QUICK if quick else FULL
    raw = _measured(scale, dynamo_python)
    rows = [*_ours(raw["main"]), *_dynamo(raw["main"]), *_growth(raw["points"])]
    _write(rows, raw, RESULTS / "decision-quick.json" if quick else RESULT)
    if not quick:
        plot()
    return rows


def _measured(scale: Scale, dynamo_python: str | None) -> dict[str, Any]:
    main = {"point": scale.main, "ours": [], "dynamo": [], "absent": None}
    with working(sys.executable, "decision_ours.py", scale.main) as ours:
        main["fill"] = ours.ask("fill")
        try:
            python = dynamo_python or dynamo_environment()
            with working(python, "decision_dynamo.py", scale.main) as dynamo:
                main["dynamo_fill"] = dynamo.ask("fill")
                _rounds(scale, main, ours, dynamo)
        except Absent as absent:
            main["absent"], main["dynamo"], main["ours"] = str(absent), [], []
            _rounds(scale, main, ours, None)
        main["restart"] = ours.ask("restart")
    points = [_point(scale.main, main["fill"], main["ours"])]
    for point in scale.growth:
        with working(sys.executable, "decision_ours.py", point) as ours:
            fill = ours.ask("fill")
            ours.ask("round", decisions=WARM_UP, seed=0)
            rounds = [
                ours.ask("round", decisions=scale.decisions, seed=seed)
                for seed in range(1, min(3, scale.rounds) + 1)
            ]
            points.append(_point(point, fill, rounds))
    return {"main": main, "points": points, "load_average": os.getloadavg()}


def _rounds(scale: Scale, main: dict[str, Any], ours: Worker, dynamo: Worker | None) -> None:
    """In turns, so that whatever else the machine does meets both."""
    for seed in range(scale.rounds + 1):
        decisions = scale.decisions if seed else WARM_UP
        for name, worker in (("ours", ours), ("dynamo", dynamo)):
            if worker is not None:
                # Dynamo decides twice a round, by tokens and by hashes.
                wanted = decisions if name == "ours" else decisions // 2
                answer = worker.ask("round", decisions=wanted, seed=seed)
                if seed:
                    main[name].append(answer)


def dynamo_environment() -> str:
    """A Python that has Dynamo's runtime, made once in the cache. Raises `Absent`."""
    sys.path.insert(0, str(ROOT))
    from cluster.config import cache_dir

    python = cache_dir() / f"bench-{DYNAMO.replace('==', '-')}" / "bin" / "python"
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(python.parents[1])],
        [str(python), "-m", "pip", "install", "--quiet", *DYNAMO_NEEDS],
    ]
    for command in commands if not _has_dynamo(python) else []:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            last = (made.stderr.strip().splitlines() or ["no message"])[-1]
            raise Absent(f"{DYNAMO} cannot be installed: {last}")
    return str(python)


def _has_dynamo(python: Path) -> bool:
    probe = "import dynamo.llm, zmq, msgspec, xxhash, psutil"
    return (
        python.exists()
        and subprocess.run([str(python), "-c", probe], capture_output=True, check=False).returncode
        == 0
    )


# ------------------------------------------------------------------ rows


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _of_rounds(rounds: list[dict[str, Any]], series: str, share: float) -> list[float]:
    return [percentile(each[series], share) for each in rounds]


def _rate(each: dict[str, Any], *series: str) -> float:
    """Decisions a second of the time that these took."""
    spent_us = sum(sum(each[name]) for name in series)
    return len(each[series[0]]) / spent_us * 1e6


def row(
    name: str,
    values: list[float],
    unit: str,
    target: float | None = None,
    at_least: bool = False,
    detail: str = "",
) -> Row:
    """The median of repeats, with their spread."""
    value = median(values)
    ok = target is None or (value >= target if at_least else value <= target)
    if len(values) > 1:
        spread = f"{min(values):.4g} to {max(values):.4g} over {len(values)} repeats"
        detail = f"{spread}; {detail}" if detail else spread
    return Row(name, round(value, 2), unit, target, ok, detail)


def _ours(main: dict[str, Any]) -> list[Row]:
    rounds, fill, (blocks, replicas, _) = main["ours"], main["fill"], main["point"]
    at = f"{blocks / MILLION:g} M blocks, {replicas} replicas"
    with_churn = median(_rate(each, "decision_us", "churn_us") for each in rounds)
    parts = ("hashing", "lookup", "scoring")
    shares = [
        row(f"decision: {part} p50", _of_rounds(rounds, f"{part}_us", 0.5), "us") for part in parts
    ]
    return [
        row("decision p50", _of_rounds(rounds, "decision_us", 0.5), "us", detail=at),
        row("decision p99", _of_rounds(rounds, "decision_us", 0.99), "us", 150.0, detail=at),
        row(
            "decisions on one core",
            [_rate(each, "decision_us") for each in rounds],
            "1/s",
            8000.0,
            at_least=True,
            detail=f"{with_churn:.0f}/s with the churn that is taken in between them",
        ),
        *shares,
        _stall(main),
        row("catalogue memory", [fill["bytes_a_block"]], "B/block", 130.0, detail=at),
        row(
            "event ingest",
            [fill["ingest_blocks_s"]],
            "blocks/s",
            500_000.0,
            at_least=True,
            detail="Blocks messages decoded from msgpack and applied, while filling",
        ),
    ]


def _stall(main: dict[str, Any]) -> Row:
    steps = {
        "filling": main["fill"],
        "churn": _longest(main["ours"], "longest_churn"),
        "decision": _longest(main["ours"], "longest_decision"),
        "sweep of a shard": main["restart"],
    }
    longest = max(steps, key=lambda name: steps[name]["longest_ms"])
    told = ", ".join(
        f"{name} {step['longest_ms']:.2f} ({step['longest_cpu_ms']:.2f} on the core)"
        for name, step in steps.items()
    )
    collected = max(each["gc_longest_ms"] for each in [main["fill"], *main["ours"]])
    detail = f"longest step: {told} ms; longest garbage collection {collected:.2f} ms"
    return row("longest stall", [steps[longest]["longest_ms"]], "ms", 5.0, detail=detail)


def _longest(rounds: list[dict[str, Any]], name: str) -> dict[str, float]:
    return {
        field: max(each[name][field] for each in rounds)
        for field in ("longest_ms", "longest_cpu_ms")
    }


def _dynamo(main: dict[str, Any]) -> list[Row]:
    names = ("rate against Dynamo's", "rate against Dynamo's with hashes passed in")
    if main["absent"]:
        why = f"not measured: {main['absent']}"
        return [
            Row(names[0], None, "x", 2.5, False, why),
            Row(names[1], None, "x", None, True, why),
        ]
    ours, theirs = main["ours"], main["dynamo"]
    pairs = list(zip(ours, theirs, strict=True))
    rows = []
    for kind, series in (("tokens", "decision_us"), ("hashes", "hashes_us")):
        name = f"Dynamo decision by {kind}"
        rows += [
            row(f"{name} p50", _of_rounds(theirs, series, 0.5), "us"),
            row(f"{name} p99", _of_rounds(theirs, series, 0.99), "us"),
            row(f"{name}, rate", [_rate(each, series) for each in theirs], "1/s"),
        ]
    by_tokens = [_rate(a, "decision_us") / _rate(b, "decision_us") for a, b in pairs]
    by_hashes = [_rate(a, "decision_us") / _rate(b, "hashes_us") for a, b in pairs]
    return [
        *rows,
        row(names[0], by_tokens, "x", 2.5, at_least=True, detail=f"SelectionService of {DYNAMO}"),
        row(names[1], by_hashes, "x", detail="ours still hashes the tokens itself"),
        row("Dynamo memory", [main["dynamo_fill"]["bytes_a_block"]], "B/block"),
    ]


def _point(point: Point, fill: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    shapes = Counter[str]()
    for each in rounds:
        shapes.update(each["shapes"])
    return {
        "blocks": point[0],
        "replicas": point[1],
        "kind": point[2],
        "shapes": shapes,
        "bytes_a_block": fill["bytes_a_block"],
        "ingest_blocks_s": fill["ingest_blocks_s"],
        "fill_longest_ms": fill["longest_ms"],
        "fill_longest_cpu_ms": fill["longest_cpu_ms"],
        "p50_us": _of_rounds(rounds, "decision_us", 0.5),
        "p99_us": _of_rounds(rounds, "decision_us", 0.99),
    }


def _growth(points: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for point in points[1:]:
        name = f"decision p99 at {point['blocks'] / MILLION:g} M x {point['replicas']}"
        name += KINDS[point["kind"]]
        detail = (
            f"p50 {median(point['p50_us']):.0f} us, {point['bytes_a_block']:.0f} B/block, "
            f"{point['ingest_blocks_s']:.0f} blocks/s, longest step of filling "
            f"{point['fill_longest_ms']:.2f} ms ({point['fill_longest_cpu_ms']:.2f} on the core)"
        )
        tiered = point["kind"] == "tiered"
        if tiered:
            planned, of_all = point["shapes"], sum(point["shapes"].values())
            told = (f"{name} {100 * n / of_all:.0f} %" for name, n in sorted(planned.items()))
            detail = f"{', '.join(told)}; {detail}"
        target = SPLIT_US if tiered else None
        rows.append(row(name, point["p99_us"], "us", target, detail=detail))
    return rows


# ------------------------------------------------------------------ what is kept


def _write(rows: list[Row], raw: dict[str, Any], path: Path) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    main = raw["main"]
    series = {
        "ours_us": [_rounded(each["decision_us"]) for each in main["ours"]],
        "dynamo_us": [_rounded(each["decision_us"]) for each in main["dynamo"]],
        "dynamo_hashes_us": [_rounded(each["hashes_us"]) for each in main["dynamo"]],
        "points": raw["points"],
    }
    report = {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
            "python": platform.python_version(),
            "load_average": raw["load_average"],
        },
        "commit": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [asdict(each) for each in rows],
        "series": series,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report) + "\n")


def _rounded(values: list[float]) -> list[float]:
    """Every tenth of the sorted values and all of the last hundredth: the curve, not the bulk."""
    ordered = [round(value, 1) for value in sorted(values)]
    tail = len(ordered) - len(ordered) // 100
    return ordered[:tail:10] + ordered[tail:]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def plot() -> None:
    """The plots of what was last measured; without matplotlib, none."""
    try:
        import decision_plots
    except ImportError as error:
        print(f"no plots: {error}; install matplotlib and run with --plot", file=sys.stderr)
        return
    decision_plots.draw(json.loads(RESULT.read_text()), RESULTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 M blocks, in half a minute")
    parser.add_argument("--dynamo-python", help=f"a Python that has {', '.join(DYNAMO_NEEDS)}")
    parser.add_argument("--plot", action="store_true", help="draw the last results again")
    options = parser.parse_args()
    if options.plot:
        plot()
        return 0
    for each in measure(options.quick, options.dynamo_python):
        target = "" if each.target is None else f" (target {each.target:g})"
        value = "-" if each.value is None else f"{each.value:g}"
        verdict = "ok  " if each.ok else "MISS"
        print(f"{verdict} {each.name}: {value} {each.unit}{target}  {each.detail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
