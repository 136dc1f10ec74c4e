"""One engine that is asked the same twice: what it says it has to compute before it begins.

Run as a program: `backlog_engine.py MODEL > [tokens to compute at first, at the second time]`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from cluster.app import environment
from cluster.config import load
from tests.flow.erasing_engine import ROOT, Bench


def run(model: Path) -> list[int]:
    """What the program found."""
    env = {**os.environ, **environment(load(None, {}), model, 1), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(model)]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    )
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    bench = Bench(sys.argv[1])
    told = []
    for name in ("first", "again"):
        bench.add(name, "aa.11", 3)
        # The report of its admission comes before that of any step.
        told.append(bench.busy().load.pending_prefill_tokens)
        bench.tokens(name, 3)
    bench.engine.stop()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
