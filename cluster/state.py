"""What a running cluster leaves on disk, so that other commands find and end it."""

import os
import time
from pathlib import Path

import msgspec
import psutil

from cluster.config import cache_dir


class State(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster that this machine started. `run_dir` holds all that it writes."""

    pid: int
    created_s: float
    run_dir: str
    url: str
    started_at: float
    # In PEM, where the cluster serves HTTPS: the one that its answers must come with.
    certificate: str | None = None
    # Where its ingresses on this machine write their audit.
    audit: str | None = None

    def supervisor(self) -> psutil.Process | None:
        """The process that started the cluster, while it lives (pids are used again)."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.created_s) < 1.0 and process.is_running()
        except psutil.NoSuchProcess:
            return None
        return process if alive else None


def state_file() -> Path:
    return cache_dir() / "cluster.json"


def read() -> State | None:
    """The state of the cluster that was started last, if it was not ended."""
    try:
        return msgspec.json.decode(state_file().read_bytes(), type=State)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def write(
    run_dir: Path, url: str, certificate: str | None = None, audit: str | None = None
) -> State:
    """Record the cluster of this process."""
    me = psutil.Process()
    state = State(
        pid=os.getpid(),
        created_s=me.create_time(),
        run_dir=str(run_dir),
        url=url,
        started_at=time.time(),
        certificate=certificate,
        audit=audit,
    )
    state_file().parent.mkdir(parents=True, exist_ok=True)
    draft = state_file().with_suffix(".tmp")
    draft.write_bytes(msgspec.json.encode(state))
    draft.replace(state_file())
    return state


def clear() -> None:
    """Forget it."""
    state_file().unlink(missing_ok=True)


def leftovers(run_dir: str) -> list[psutil.Process]:
    """Processes of a cluster that outlived it, except this one: those that write to a file in
    its run folder. Each process of Ray's logs there; titles and environments are rewritten."""
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and _writes(p.pid, run_dir)]


def _writes(pid: int, folder: str) -> bool:
    try:
        links = Path(f"/proc/{pid}/fd").iterdir()
        return any(os.readlink(fd).startswith(folder) and _writable(pid, fd.name) for fd in links)
    except OSError:
        return False


def _writable(pid: int, fd: str) -> bool:
    """Somebody who only reads a log, with `tail -f` say, is none of ours."""
    for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("flags:"):
            return bool(int(line.split()[1], 8) & (os.O_WRONLY | os.O_RDWR))
    return False
