"""How long a start takes and what a cluster at rest costs: `make bench-start`.

Fresh: from `git clone` of this checkout's HEAD into an empty folder to the first token. Second:
from the command to its `ready` line, with everything set up. At rest: PSS of each engine's
processes, and cores used by all processes of the cluster over 20 s.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "latest.json"
REST_S = 20.0


@dataclass(frozen=True)
class Row:
    """One figure; `target` is None where none was asked for."""

    name: str
    value: float
    unit: str
    target: float | None
    ok: bool
    detail: str = ""


def row(name: str, value: float, unit: str, target: float | None, detail: str = "") -> Row:
    ok = target is None or value <= target
    return Row(name, round(value, 3), unit, target, ok, detail)


@contextlib.contextmanager
def serving(folder: Path, port: int, env: dict[str, str]) -> Iterator[tuple[float, str]]:
    """`make serve` in `folder`; yields the seconds until `ready`, and the address."""
    url = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    process = subprocess.Popen(
        ["make", "serve", f"ARGS=--port {port}"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready "):
                break
        else:
            raise SystemExit("no ready line:\n" + "".join(lines[-20:]))
        yield time.monotonic() - began, url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(90)


def first_token(url: str) -> None:
    body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).read()


def fresh() -> Row:
    """Clone, set up, serve and ask, in an empty folder with a venv and a cache of its own."""
    with tempfile.TemporaryDirectory(prefix="breakeven-fresh-") as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith("BREAKEVEN_")}
        began = time.monotonic()
        clone = Path(folder) / "breakeven"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        with serving(clone, 8123, env) as (_, url):
            first_token(url)
            return row("fresh clone to first token", time.monotonic() - began, "s", None)


def second_and_rest() -> list[Row]:
    with serving(ROOT, 8123, dict(os.environ)) as (ready_s, url):
        rows = [row("second start to ready", ready_s, "s", 60.0)]
        first_token(url)
        time.sleep(5)
        return [*rows, *at_rest(url)]


def at_rest(url: str) -> list[Row]:
    with urllib.request.urlopen(f"{url}/admin/replicas", timeout=10) as answer:
        replicas: list[dict[str, Any]] = json.load(answer)["replicas"]
    engines = {replica["name"]: tree(replica["pid"]) for replica in replicas}
    everyone = cluster_processes()
    before = {process.pid: cpu_s(process) for process in everyone}
    time.sleep(REST_S)
    cores = {p.pid: (cpu_s(p) - before[p.pid]) / REST_S for p in everyone}
    rows = []
    for name, processes in sorted(engines.items()):
        pss = sum(process.memory_full_info().pss for process in processes)
        used = sum(cores.get(process.pid, 0.0) for process in processes)
        rows.append(row(f"{name}: PSS", pss / 1e9, "GB", 3.6, f"{len(processes)} process(es)"))
        rows.append(row(f"{name}: cores at rest", used, "cores", 0.1))
    total = f"{len(everyone)} processes, Ray's included"
    return [*rows, row("cluster at rest", sum(cores.values()), "cores", 0.5, total)]


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cluster_processes() -> list[psutil.Process]:
    """All processes below the one that runs `-m cluster serve`."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[1:4] == ["-m", "cluster", "serve"]:
                return tree(process.pid)
    raise SystemExit("no supervisor found")


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def write(rows: list[Row]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    report = {
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
            "python": platform.python_version(),
        },
        "commit": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [asdict(each) for each in rows],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-fresh", action="store_true", help="skip the fresh clone")
    rows = [] if parser.parse_args().no_fresh else [fresh()]
    rows += second_and_rest()
    write(rows)
    for each in rows:
        target = "" if each.target is None else f" (target {each.target:g})"
        print(f"{'ok  ' if each.ok else 'MISS'} {each.name}: {each.value:g} {each.unit}{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
