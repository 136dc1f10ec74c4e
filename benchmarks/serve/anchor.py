"""Our cluster beside Ray Serve LLM's prefill/decode app: same model, options, load and machine.

Three systems take turns, one at a time, since idle engines of another would disturb: ours, Ray
Serve LLM as its guide says (`documented`), and with two settings that help it on this machine
(`tuned`); `anchor_systems.py` lists all that differs. A turn starts the system, warms it, loads
it, and kills its only prefill replica. Figures are medians of the turns; the details have the
spread. A run that was stopped goes on where it was.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import psutil
from anchor_faults import kill_prefill
from anchor_load import Prompts, Shape, closed_loop
from anchor_rows import TITLES, Row, Turn, rows_of
from anchor_systems import MODEL, ROOT, System, ours, ray_serve_llm

RESULTS = Path(__file__).parent / "results"
REPORT = RESULTS / "anchor.json"
PICTURE = RESULTS / "anchor.png"
SYSTEMS = ("ours", "documented", "tuned")
TURNS = 3
SHAPES = (
    Shape("256-token prompts, 1 client", 256, 32, 10, 1),
    Shape("256-token prompts, 4 clients", 256, 32, 20, 4),
    Shape("1,024-token prompts, 1 client", 1024, 16, 6, 1),
)
QUICK = tuple(Shape(s.name, s.prompt_tokens, s.output_tokens, 4, s.concurrency) for s in SHAPES[:2])
WARM = (Shape("warm", 256, 4, 3, 1), Shape("warm", 64, 4, 4, 4), Shape("warm", 1024, 2, 1, 1))


def measure(quick: bool, port: int = 18170, limit: int | None = None) -> list[Row]:
    """Run the turns that are missing, `limit` at most, and write what there is after each.

    `quick`: one turn of ours and of `tuned`, little load and no kill, 3 to 4 minutes; it writes
    nothing.
    """
    turns = [] if quick else _turns_so_far()
    shapes = [shape.name for shape in (QUICK if quick else SHAPES)]
    for name, number in list(_missing(turns, quick))[:limit]:
        turns.append(_turn(name, number, port, quick))
        if not quick:
            _write(rows_of(turns, shapes), turns)
    return rows_of(turns, shapes)


def _missing(turns: list[Turn], quick: bool) -> Iterator[tuple[str, int]]:
    done = {(turn["system"], turn["turn"]) for turn in turns}
    names = ("ours", "tuned") if quick else SYSTEMS
    for number in range(1 if quick else TURNS):
        for name in names:
            if (name, number) not in done:
                yield name, number


def _turn(name: str, number: int, port: int, quick: bool) -> Turn:
    print(f"==> {TITLES[name]}, turn {number + 1}", flush=True)
    # Whatever else runs here disturbs; it is told with the figures.
    busy = psutil.cpu_percent(3.0) / 100 * (os.cpu_count() or 1)
    turn: Turn = {"system": name, "turn": number, "cores_busy_before": round(busy, 2)}
    try:
        with _start(name, port) as system:
            turn["ready_s"] = system.ready_s
            asyncio.run(_load(system, number, turn, quick))
            print(f"    {json.dumps(turn)}", flush=True)
    except SystemExit as error:
        # A system that cannot be measured is a result, not the end of the run.
        turn["failure"] = str(error)[-2000:]
        print(f"    failed: {turn['failure']}", flush=True)
    return turn


def _start(name: str, port: int) -> AbstractContextManager[System]:
    return ours(port) if name == "ours" else ray_serve_llm(port, tuned=name == "tuned")


async def _load(system: System, number: int, turn: Turn, quick: bool) -> None:
    prompts = Prompts(number)
    for shape in WARM:
        await closed_loop(system.url, MODEL, shape, prompts)
    turn["loads"] = {}
    for shape in QUICK if quick else SHAPES:
        before = system.plans()
        result = await closed_loop(system.url, MODEL, shape, prompts)
        after = system.plans()
        result["plans"] = {k: n - before.get(k, 0.0) for k, n in after.items()}
        turn["loads"][shape.name] = result
    if not quick:
        turn["kill"] = await kill_prefill(system, 1000 + number)


def _turns_so_far() -> list[Turn]:
    """Turns of a run of this commit that was stopped; none where all were run."""
    try:
        report = json.loads(REPORT.read_text())
    except (OSError, ValueError):
        return []
    turns: list[Turn] = report["raw"] if report.get("commit") == _commit() else []
    return turns if any(_missing(turns, quick=False)) else []


def _write(rows: list[Row], turns: list[Turn]) -> None:
    report = {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [asdict(each) for each in rows],
        "raw": turns,
    }
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    draft = REPORT.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=2) + "\n")
    draft.replace(REPORT)
    try:
        from anchor_plot import plot

        plot(turns, PICTURE)
    except ImportError as error:
        print(f"no picture: {error}; anchor_plot.py draws it from {REPORT.name}", flush=True)


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--port", type=int, default=18170)
    parser.add_argument("--limit", type=int, help="stop after so many turns; a later run goes on")
    arguments = parser.parse_args()
    for each in measure(arguments.quick, arguments.port, arguments.limit):
        target = "" if each.target is None else f" (target {each.target:g})"
        value = "-" if each.value is None else f"{each.value:g}"
        verdict = "ok  " if each.ok else "MISS"
        print(f"{verdict} {each.name}: {value} {each.unit}{target}; {each.detail}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
