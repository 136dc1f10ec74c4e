"""`make bench-serve`: what serving through the cluster costs and brings, part by part."""

import sys
from pathlib import Path

# Run as a program: the packages are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import runner
from benchmarks.serve import plots

SUITE = runner.Suite(
    folder=Path(__file__).resolve().parent,
    parts=(
        "overhead",
        "ingress",
        "interference",
        "conversations",
        "decision",
        "staleness",
        "anchor",
    ),
    draw=plots.draw,
    # Its own smoke run takes longer than the rest together: it is made when asked for.
    left_out=("anchor",),
)

if __name__ == "__main__":
    sys.exit(runner.main(SUITE, __doc__))
