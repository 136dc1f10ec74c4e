"""Rows, raw samples and the report of a benchmark: `make bench-serve`, `make bench-tiers`,
`make bench-breakeven`.

Each benchmark is a folder of parts, one module each, and keeps what it measures below its own
`results`.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; `target` is None where none was asked for, `value` where none could be had."""

    name: str
    value: float | None
    unit: str
    target: float | None
    ok: bool
    detail: str = ""

    def line(self) -> str:
        """The row as it is printed."""
        target = "" if self.target is None else f" (target {self.target:g})"
        verdict = "ok  " if self.ok else "MISS"
        value = "none" if self.value is None else f"{self.value:g} {self.unit}"
        return f"{verdict} {self.name}: {value}{target}  {self.detail}"


def at_most(name: str, value: float, unit: str, target: float, detail: str = "") -> Row:
    return Row(name, _round(value), unit, target, value <= target, detail)


def at_least(name: str, value: float, unit: str, target: float, detail: str = "") -> Row:
    return Row(name, _round(value), unit, target, value >= target, detail)


def shown(name: str, value: float, unit: str, detail: str = "") -> Row:
    """A figure without a target."""
    return Row(name, _round(value), unit, None, True, detail)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median, least and most of repeats, for a row's detail."""
    shown_unit = f" {unit}" if unit else ""
    return (
        f"median {statistics.median(values):.3g} of {len(values)}, "
        f"{min(values):.3g}..{max(values):.3g}{shown_unit}"
    )


def quantile(values: Iterable[float], q: float) -> float:
    """The nearest-rank quantile; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class Store:
    """Raw results of one part, kept as each is measured: an interrupted run goes on behind them.

    What another commit, or another state of the working tree, measured is measured again.
    """

    def __init__(self, module: str, quick: bool) -> None:
        """`module` is the part's `__file__`: the results lie beside it."""
        part = Path(module)
        self._path = raw_folder(part.parent / "results", quick) / f"{part.stem}.json"
        self._commit = commit()
        self._kept: dict[str, Any] = {}
        if self._path.exists():
            saved = json.loads(self._path.read_text())
            if saved["commit"] == self._commit:
                self._kept = saved["results"]

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def kept(self, key: str) -> Any:
        """What `get` has measured under `key`."""
        return self._kept[key]

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The kept result under `key`, or that of `measure`, which is plain JSON."""
        if key not in self._kept:
            # As a later run will read it: tuples become lists, keys strings.
            self._kept[key] = json.loads(json.dumps(measure()))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            report = {"commit": self._commit, "date": _now(), "results": self._kept}
            draft = self._path.with_suffix(".tmp")
            draft.write_text(json.dumps(report) + "\n")
            draft.replace(self._path)
        return self._kept[key]


def raw_folder(results: Path, quick: bool) -> Path:
    """Where the samples of a benchmark are kept; a smoke run has a folder of its own."""
    return results / ("raw-quick" if quick else "raw")


def commit() -> str:
    """HEAD, and a digest of what the working tree changes in it; results do not count."""
    head = _git("rev-parse", "--short", "HEAD").strip()
    outside = ("--", ".", ":!benchmarks/*/results/*")
    changes = _git("diff", "HEAD", *outside)
    for name in _git("ls-files", "--others", "--exclude-standard", *outside).splitlines():
        path = ROOT / name
        changes += name + (path.read_text(errors="replace") if path.is_file() else "")
    return f"{head}+{sha256(changes.encode()).hexdigest()[:8]}" if changes else head


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
    }


def write(results: Path, parts: Mapping[str, Sequence[Row]], quick: bool) -> Path:
    """The report: the rows of these parts, and those of others as they were recorded, each with
    the commit that it was measured at. A smoke run has a report of its own."""
    path = results / ("quick.json" if quick else "latest.json")
    others = [row for row in _recorded(path) if row["part"] not in parts]
    at = commit()
    rows = [{**asdict(row), "part": part, "commit": at} for part in parts for row in parts[part]]
    raw = raw_folder(results, quick)
    report = {
        "machine": machine(),
        "commit": at,
        "date": _now(),
        "rows": sorted([*others, *rows], key=lambda row: str(row["part"])),
        "raw": sorted(str(each.relative_to(results.parent)) for each in raw.glob("*.json")),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def _recorded(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    except FileNotFoundError:
        return []
    return rows


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
