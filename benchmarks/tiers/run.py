"""`make bench-tiers`: what the tiers bring and cost, part by part."""

import sys
from pathlib import Path

# Run as a program: the packages are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import runner
from benchmarks.tiers import plots

SUITE = runner.Suite(
    folder=Path(__file__).resolve().parent,
    parts=(
        "restore",
        "vault_restore",
        "copies",
        "stores",
        "codecs",
        "eviction",
        "peers",
        "vault",
        "peer",
    ),
    draw=plots.draw,
)

if __name__ == "__main__":
    sys.exit(runner.main(SUITE, __doc__))
