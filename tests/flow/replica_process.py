"""One replica in a process of its own, without Ray:
`replica_process.py NAME ROLE MODEL FOLDER TIERS`, the last as in the configuration.

Writes who it is to FOLDER/NAME.json once it serves, and ends on SIGTERM.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cluster.app import environment
from cluster.config import engine_options, load
from workers.curve import server_keys
from workers.messages import Replica, Role
from workers.peer.keys import peer_keys
from workers.replica import ReplicaProcess, ReplicaSettings
from workers.tiers import Tiers

SECRET = b"of this test".ljust(32)
ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def replicas(
    model: Path, folder: Path, tiers: dict[str, Any] | None = None
) -> Iterator[tuple[Replica, Replica]]:
    """A prefill and a decode replica that serve."""
    env = {**os.environ, **environment(load(None, {}), model, 1), "PYTHONPATH": str(ROOT)}
    started = [_start(role, model, folder, env, tiers or {}) for role in Role]
    try:
        yield (_await(folder, "prefill-0", started[0]), _await(folder, "decode-0", started[1]))
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)


def _start(
    role: Role, model: Path, folder: Path, env: dict[str, str], tiers: dict[str, Any]
) -> "subprocess.Popen[bytes]":
    words = [f"{role}-0", role, str(model), str(folder), json.dumps(tiers)]
    command = [sys.executable, __file__, *words]
    with (folder / f"{role}.log").open("w") as log:
        return subprocess.Popen(command, env=env, stderr=log)


def _await(folder: Path, name: str, process: subprocess.Popen[bytes]) -> Replica:
    path, deadline = folder / f"{name}.json", time.monotonic() + 120
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{name} did not start; see {folder}")
        time.sleep(0.1)
    return msgspec.json.decode(path.read_bytes(), type=Replica)


async def _serve(name: str, role: str, model: str, folder: Path, tiers: Tiers) -> None:
    config = load(None, {"engine": {"kv_cache_memory_bytes": 1 << 26}})
    pool = config.prefill if role == Role.PREFILL else config.decode
    settings = ReplicaSettings(
        role=Role(role),
        model=model,
        served_names=("tiny",),
        engine=engine_options(config, pool),
        host="127.0.0.1",
        channel_keys=server_keys(SECRET),
        scratch=str(folder),
        probe_s=0.5,
        tiers=tiers,
        peer_keys=None if tiers.peer is None else peer_keys(SECRET),
    )
    process = await asyncio.to_thread(ReplicaProcess, name, settings)
    serving = asyncio.create_task(process.serve())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    draft = folder / f"{name}.draft"
    draft.write_bytes(msgspec.json.encode(process.replica))
    draft.rename(folder / f"{name}.json")
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    await asyncio.to_thread(process.stop)


if __name__ == "__main__":
    wanted = msgspec.json.decode(sys.argv[5], type=Tiers)
    asyncio.run(_serve(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), wanted))
