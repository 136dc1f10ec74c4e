"""One engine that two tenants use, one of whom is erased: what its pages hold, and when.

Run as a program: `erasing_engine.py MODEL > {"before": ..., "after": ...}`. Pages go by number;
those counted are the ones that hold anything but zeros. Page 0 is vLLM's placeholder.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.app import environment
from cluster.config import engine_options, load

ROOT = Path(__file__).resolve().parents[2]
# No multiple of a block: a tail page of the prompt has no name.
PROMPT = list(range(2000, 2170))
ACME, OTHER = "aa.11", "bb.22"


def run(model: Path) -> dict[str, Any]:
    """What the program found."""
    env = {**os.environ, **environment(load(None, {}), model, 1), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(model)]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Bench:
    """A running engine without a channel."""

    def __init__(self, model: str) -> None:
        from workers import options
        from workers.engine import Engine

        config = load(None, {"engine": {"kv_cache_memory_bytes": 1 << 26}})
        parsed = options.namespace(model, ("tiny",), engine_options(config, config.decode))
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.engine = Engine(options.engine_config(parsed, None, events=True), self._said.put)
        self.engine.start()

    def add(self, name: str, salt: str, n_tokens: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        from kv.salt import tag_of

        params = SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True)
        request = EngineCoreRequest(name, PROMPT, None, params, None, 0.0, None, salt, None)
        request.session_id = tag_of(salt)
        self.engine.add(request)

    def busy(self) -> Any:
        """The next report of an engine that has a request."""
        while True:
            report = self._said.get(timeout=60)
            if report.load.waiting + report.load.running:
                return report

    def tokens(self, name: str, until: int) -> list[int]:
        """Of a request, until there are so many."""
        tokens: list[int] = []
        while len(tokens) < until:
            deltas = self._said.get(timeout=60).deltas
            tokens += [t for d in deltas if d.request_id == name for t in d.token_ids]
        return tokens

    def erase(self) -> tuple[int, int]:
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.engine.erase(("aa",), told.put)
        erased = told.get(timeout=60)
        return erased.blocks, erased.in_use

    def written(self) -> list[int]:
        """Pages that are not all zeros, read between two steps."""
        return self._between_steps(lambda: [p for p in range(1, self._pages()) if self._any(p)])

    def _pages(self) -> int:
        pages: int = self.engine.core.scheduler.kv_cache_config.num_blocks
        return pages

    def _any(self, page: int) -> bool:
        layers = self.engine.core.model_executor.driver_worker.worker.model_runner.kv_caches
        return any(bool(layer[page].any()) for layer in layers)

    def _between_steps(self, look: Callable[[], list[int]]) -> list[int]:
        found: list[list[int]] = []
        seen = threading.Event()
        self.engine._orders.put(lambda: (found.append(look()), seen.set())[1])
        assert seen.wait(60)
        return found[0]


def main() -> None:
    bench = Bench(sys.argv[1])
    for salt in (ACME, OTHER):
        bench.add(salt, salt, 3)
        bench.tokens(salt, 3)
    before = bench.written()
    idle = bench.erase()
    after = bench.written()
    bench.add("plain", ACME, 120)
    plain = bench.tokens("plain", 120)
    bench.erase()
    bench.add("stream", ACME, 120)
    first = bench.tokens("stream", 40)
    running = bench.erase()
    during = bench.written()
    tokens = first + bench.tokens("stream", 120 - len(first))
    bench.add("last", OTHER, 1)  # a step in which the stream is over
    bench.tokens("last", 1)
    ended = bench.written()
    bench.engine.stop()
    print(
        json.dumps(
            {
                "before": before,
                "idle": idle,
                "after": after,
                "running": running,
                "during": during,
                "same_tokens": tokens == plain,
                "ended": ended,
            }
        )
    )


if __name__ == "__main__":
    main()
