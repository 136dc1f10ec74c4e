"""`make bench-breakeven`: what deciding between fetching and computing brings, part by part."""

import sys
from pathlib import Path

# Run as a program: the packages are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import runner
from benchmarks.breakeven import plots

SUITE = runner.Suite(
    folder=Path(__file__).resolve().parent,
    parts=("grid", "slowed", "batch", "load", "seed"),
    draw=plots.draw,
    # A tiny model is computed as soon as it is fetched: there is nothing to follow, and nobody
    # waits for it long enough to tell whether others gave way, or a request was late.
    left_out=("slowed", "batch", "load"),
)

if __name__ == "__main__":
    sys.exit(runner.main(SUITE, __doc__))
