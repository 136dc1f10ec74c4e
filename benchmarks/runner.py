"""What `make bench-serve` and `make bench-tiers` have in common: parts, measured one by one.

Each part is a module with `measure(quick) -> list[Row]`. A part that is done at this commit is not
measured again, nor is what an interrupted one had measured; `--fresh` forgets both. A part that
takes hours may have `measured(quick)`, too, rows of what there is so far (`--measured`). With
QUICK=1 a smoke run of every part.
"""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.result import Row, Store, raw_folder, write


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark: a folder whose modules are its parts; the `left_out` ones are no part of a
    smoke run unless it asks for them."""

    folder: Path
    parts: tuple[str, ...]
    draw: Callable[[Path, bool], None]
    left_out: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        return self.folder / "results"


def main(suite: Suite, told: str | None) -> int:
    """Measure what is asked for and write the report; 1 if a part failed. `told`: its help."""
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    asked = [part for part in suite.parts if not (quick and part in suite.left_out)]
    arguments = _parser(suite, asked, told).parse_args()
    # As Ctrl-C: the servers that were started are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(suite, quick, arguments)
    except KeyboardInterrupt:
        print("stopped; run it again to go on behind what is measured", file=sys.stderr)
        return 130


def _run(suite: Suite, quick: bool, arguments: argparse.Namespace) -> int:
    parts: dict[str, list[Row]] = {}
    failed = []
    for part in suite.parts:
        try:
            if rows := _rows(suite, part, quick, part in arguments.only, arguments):
                parts[part] = rows
        except Exception as error:  # one part's edge: the others are measured all the same
            failed.append(part)
            print(f"    {part} failed: {type(error).__name__}: {error}", flush=True)
    path = write(suite.results, parts, quick)
    suite.draw(suite.results, quick)
    for row in (row for rows in parts.values() for row in rows):
        print(row.line())
    print(f"written to {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _parser(suite: Suite, asked: list[str], told: str | None) -> argparse.ArgumentParser:
    def parts(text: str) -> list[str]:
        named = text.split(",")
        unknown = sorted(set(named) - set(suite.parts))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such part of {suite.parts}")
        return named

    parser = argparse.ArgumentParser(description=told)
    parser.add_argument(
        "--only",
        type=parts,
        default=asked,
        help=f"parts to measure, comma-separated: {','.join(suite.parts)}; "
        "others show what they have",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is measured")
    parser.add_argument(
        "--measured", action="store_true", help="rows of what is measured, if a part has such"
    )
    return parser


def _rows(
    suite: Suite, part: str, quick: bool, asked: bool, arguments: argparse.Namespace
) -> list[Row]:
    """A part's rows: kept ones of this commit, or measured now if that is asked."""
    name = f"benchmarks.{suite.folder.name}.{part}"
    if importlib.util.find_spec(name) is None:
        print(f"==> {part}: not there", flush=True)
        return []
    if asked and arguments.measured:
        return list(importlib.import_module(name).measured(quick))
    if asked and arguments.fresh:
        for kept_as in (part, f"{part}.rows"):
            (raw_folder(suite.results, quick) / f"{kept_as}.json").unlink(missing_ok=True)
    store = Store(str(suite.folder / f"{part}.rows.py"), quick)
    if not asked and "rows" not in store:
        return []
    kept: Any = store.get("rows", lambda: _measure(name, part, quick))
    return [Row(**row) for row in kept]


def _measure(name: str, part: str, quick: bool) -> list[dict[str, Any]]:
    print(f"==> {part}", flush=True)
    began_s = time.monotonic()
    module = importlib.import_module(name)
    # Other parts bring rows of their own class with the same fields.
    rows = [json.loads(json.dumps(asdict(row))) for row in module.measure(quick)]
    print(f"    {part} done in {time.monotonic() - began_s:.0f} s", flush=True)
    return rows
