"""What vLLM allocates for a model: the geometry of an engine's pages.

Run as a program: `laid_out.py MODEL OPTIONS > {"groups": ..., ...}`. Without weights in the folder,
the option `load_format: dummy` makes some.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.app import engine_options, environment
from cluster.config import load
from kv.geometry import Geometry

ROOT = Path(__file__).resolve().parents[2]


def shape(geometry: Geometry) -> list[list[int | None]]:
    """What each group keeps: layers, bytes a token, window, bytes of state; in some order."""
    found = [[g.layers, g.token_bytes, g.window_tokens, g.state_bytes] for g in geometry.groups]
    return sorted(found, key=str)


def run(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What the program found."""
    env = {**os.environ, **environment(load(None, {}), model, 1), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(model), json.dumps(options)]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from workers import options
    from workers.engine import Engine

    given = {"kv_cache_memory_bytes": 1 << 26, "max_model_len": 2048, **json.loads(sys.argv[2])}
    config = load(None, {"engine": given})
    parsed = options.namespace(sys.argv[1], ("tiny",), engine_options(config, config.decode))
    engine = Engine(options.engine_config(parsed, None, events=True), lambda _: None)
    pages = engine.core.scheduler.kv_cache_config
    found = {
        "groups": shape(engine.geometry()),
        "bytes_per_token": engine.kv_bytes_per_token(),
        "allocated_bytes": sum(tensor.size for tensor in pages.kv_cache_tensors),
        "blocks": pages.num_blocks,
    }
    engine.core.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
