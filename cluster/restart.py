"""`breakeven restart`: replace the replicas of a pool one after another, without losing a stream.

Serve does the replacing; only the process that serves the cluster can tell it what to deploy. So
the command leaves an order in the run folder, sends that process SIGHUP, and watches.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import state
from cluster.errors import NotRunningError, RestartError
from cluster.status import fetch

POOLS = ("prefill", "decode")
_ORDER = "restart.json"
_LOOK_S = 0.5
# For each replica: a start, and a drain of what the old one ran.
_PATIENCE_S = 240.0


def restart(pools: Sequence[str]) -> int:
    """Replace every replica of `pools` and return once all are up; prints each change."""
    found = state.read()
    supervisor = found.supervisor() if found is not None else None
    if found is None or supervisor is None:
        raise NotRunningError(found.url if found is not None else "any address")
    before = _pids(found.url, pools)
    if not before:
        raise RestartError([f"{' and '.join(pools)} (no replica is up)"])
    leave_order(Path(found.run_dir), pools)
    os.kill(supervisor.pid, signal.SIGHUP)
    print(f"replacing {', '.join(sorted(before))}", flush=True)
    deadline = time.monotonic() + _PATIENCE_S * max(1, len(before))
    shown = before
    while not _replaced(before, shown):
        if time.monotonic() > deadline:
            raise RestartError(
                sorted(name for name, pid in shown.items() if pid in before.values())
            )
        time.sleep(_LOOK_S)
        try:
            now = _pids(found.url, pools)
        except NotRunningError:  # busy starting engines: it answers again
            continue
        for name in sorted(now.keys() | shown.keys()):
            if now.get(name) != shown.get(name):
                print(f"{name}: {_pid(shown.get(name))} -> {_pid(now.get(name))}", flush=True)
        shown = now
    print("done")
    return 0


def leave_order(run_dir: Path, pools: Sequence[str]) -> None:
    """Tell the serving process which pools; it reads at SIGHUP."""
    draft = run_dir / f"{_ORDER}.tmp"
    draft.write_text(json.dumps(list(pools)))
    draft.replace(run_dir / _ORDER)


def take_order(run_dir: Path) -> tuple[str, ...]:
    """The pools that are to be restarted; every one when SIGHUP came without an order."""
    try:
        asked = json.loads((run_dir / _ORDER).read_text())
    except (FileNotFoundError, ValueError):
        return POOLS
    (run_dir / _ORDER).unlink(missing_ok=True)
    return tuple(pool for pool in POOLS if pool in asked)


def _pids(url: str, pools: Sequence[str]) -> dict[str, int]:
    """Replicas that are up, by name."""
    rows = fetch(url, "/admin/replicas")["replicas"]
    return {
        row["name"]: row["pid"] for row in rows if row["role"] in pools and row["state"] == "up"
    }


def _replaced(before: dict[str, int], now: dict[str, int]) -> bool:
    return len(now) >= len(before) and not set(before.values()) & set(now.values())


def _pid(pid: int | None) -> str:
    return "none" if pid is None else f"pid {pid}"
