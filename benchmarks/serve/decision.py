"""What routing one request costs at ten million blocks: part of `make bench-serve`.

Two processes share one core and take turns: the router's own code (`decision_ours.py`) and Dynamo's
in-process SelectionService (`decision_dynamo.py`), on the same prompts, holders and churn
(`decision_load.py`). Each holds all of its blocks all the time. A decision is all between the token
list and the plan: packing, hashing, lookup, the snapshot with what changed since the last one,
pricing.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.result import Row
from benchmarks.serve.decision_rows import DYNAMO, MILLION, Point, dynamo, growth, ours, point_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
RESULT = RESULTS / "decision.json"
DYNAMO_NEEDS = (DYNAMO, "pyzmq", "msgspec", "xxhash", "psutil")
CORE = max(os.sched_getaffinity(0))
# Decisions that only warm caches and branch predictors, before any are counted.
WARM_UP = 500
# A fill of 30 M blocks on a busy machine takes minutes.
ANSWER_S = 900.0


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


def measure(quick: bool) -> list[Row]:
    """Every row of the decision; writes them with the raw series, and draws the plots.

    A quick run writes a file of its own and draws nothing.
    """
    scale = QUICK if quick else FULL
    raw = _measured(scale)
    rows = [*ours(raw["main"]), *dynamo(raw["main"]), *growth(raw["points"])]
    _write(rows, raw, RESULTS / "decision-quick.json" if quick else RESULT)
    if not quick:
        plot()
    return rows


def _measured(scale: Scale) -> dict[str, Any]:
    main = {"point": scale.main, "ours": [], "dynamo": [], "absent": None}
    with working(sys.executable, "decision_ours.py", scale.main) as worker:
        main["fill"] = worker.ask("fill")
        try:
            with working(dynamo_environment(), "decision_dynamo.py", scale.main) as theirs:
                main["dynamo_fill"] = theirs.ask("fill")
                _rounds(scale, main, worker, theirs)
        except Absent as absent:
            main["absent"], main["dynamo"], main["ours"] = str(absent), [], []
            _rounds(scale, main, worker, None)
        main["restart"] = worker.ask("restart")
    points = [point_of(scale.main, main["fill"], main["ours"])]
    for point in scale.growth:
        with working(sys.executable, "decision_ours.py", point) as worker:
            fill = worker.ask("fill")
            worker.ask("round", decisions=WARM_UP, seed=0)
            rounds = [
                worker.ask("round", decisions=scale.decisions, seed=seed)
                for seed in range(1, min(3, scale.rounds) + 1)
            ]
            points.append(point_of(point, fill, rounds))
    return {"main": main, "points": points, "load_average": os.getloadavg()}


def _rounds(scale: Scale, main: dict[str, Any], own: Worker, theirs: Worker | None) -> None:
    """In turns, so that whatever else the machine does meets both."""
    for seed in range(scale.rounds + 1):
        decisions = scale.decisions if seed else WARM_UP
        for name, worker in (("ours", own), ("dynamo", theirs)):
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
    """The plots of what was last measured."""
    from benchmarks.serve import decision_plots

    decision_plots.draw(json.loads(RESULT.read_text()), RESULTS)
