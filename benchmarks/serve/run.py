"""`make bench-serve`: what serving through the cluster costs and brings, part by part.

Each part is a module with `measure(quick) -> list[Row]`. A part that is done at this commit is not
measured again, nor is what an interrupted one had measured; `--fresh` forgets both. With QUICK=1
a smoke run of every part.
"""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Run as a program: the packages are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.serve import plots
from benchmarks.serve.result import RESULTS, Row, Store, forget, write

PARTS = ("overhead", "ingress", "interference", "conversations", "decision", "staleness", "anchor")
# The anchor's own smoke run takes longer than the rest together: it is made when asked for.
QUICK_PARTS = PARTS[:-1]


def main() -> int:
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    arguments = _parser(QUICK_PARTS if quick else PARTS).parse_args()
    # As Ctrl-C: the servers that were started are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts: dict[str, list[Row]] = {}
    failed = []
    for part in PARTS:
        try:
            if rows := _rows(part, quick, part in arguments.only, arguments.fresh):
                parts[part] = rows
        except Exception as error:  # one part's edge: the others are measured all the same
            failed.append(part)
            print(f"    {part} failed: {type(error).__name__}: {error}", flush=True)
    path = write(parts, quick)
    plots.draw(RESULTS, quick)
    for row in (row for rows in parts.values() for row in rows):
        print(row.line())
    print(f"written to {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _parser(parts: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        type=_parts,
        default=list(parts),
        help=f"parts to measure, comma-separated: {','.join(PARTS)}; others show what they have",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is measured")
    return parser


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such part of {PARTS}")
    return parts


def _rows(part: str, quick: bool, asked: bool, fresh: bool) -> list[Row]:
    """A part's rows: kept ones of this commit, or measured now if that is asked."""
    if importlib.util.find_spec(f"benchmarks.serve.{part}") is None:
        print(f"==> {part}: not there", flush=True)
        return []
    if asked and fresh:
        forget(quick, part)
    store = Store(f"{part}.rows", quick)
    if not asked and "rows" not in store:
        return []
    kept: Any = store.get("rows", lambda: _measure(part, quick))
    return [Row(**row) for row in kept]


def _measure(part: str, quick: bool) -> list[dict[str, Any]]:
    print(f"==> {part}", flush=True)
    began_s = time.monotonic()
    module = importlib.import_module(f"benchmarks.serve.{part}")
    # Other parts bring rows of their own class with the same fields.
    rows = [json.loads(json.dumps(asdict(row))) for row in module.measure(quick)]
    print(f"    {part} done in {time.monotonic() - began_s:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; run it again to go on behind what is measured", file=sys.stderr)
        sys.exit(130)
