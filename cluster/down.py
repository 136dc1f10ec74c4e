"""`breakeven down`: end the cluster of this machine, and whatever a crash left of it."""

import contextlib
import json
import signal
import time
from pathlib import Path

import psutil

from cluster import local_ray, state

# A graceful stop drains requests first; past this it is ended the hard way.
_GRACE_S = 60.0
_LOOK_S = 0.1


def down(as_json: bool) -> int:
    """Stop the recorded cluster; succeeds when there is none. Returns the exit status."""
    found = state.read()
    if found is None:
        return _tell(as_json, "no cluster is recorded", ended=0)
    supervisor = found.supervisor()
    if supervisor is not None:
        _ask(supervisor)
    ended = local_ray.sweep(Path(found.run_dir), keep_logs=False)
    state.clear()
    return _tell(as_json, f"ended the cluster at {found.url}", ended)


def _ask(supervisor: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        supervisor.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while _runs(supervisor):
            if time.monotonic() > deadline:
                local_ray.end([supervisor])
                return
            time.sleep(_LOOK_S)


def _runs(process: psutil.Process) -> bool:
    """A process that ended and that its parent has not asked about yet has ended."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _tell(as_json: bool, what: str, ended: int) -> int:
    if as_json:
        print(json.dumps({"result": what, "leftover_processes_ended": ended}))
    else:
        extra = f"; {ended} leftover processes ended" if ended else ""
        print(f"{what}{extra}")
    return 0
