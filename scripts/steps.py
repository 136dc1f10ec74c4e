"""What a set-up shows while it works, and the lock that it holds."""

import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def count_packages_as_they_land(venv: Path) -> Iterator[None]:
    """Count what has landed: pip 23 is silent while it unpacks, most of the time it takes."""
    done = threading.Event()

    def watch() -> None:
        begun, last = time.monotonic(), count_packages(venv)
        while not done.wait(3):
            now = count_packages(venv)
            if now != last:
                print(f"    {now} packages in place, {time.monotonic() - begun:.0f} s", flush=True)
            last = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def count_packages(venv: Path) -> int:
    return sum(1 for _ in venv.glob("lib/python3*/site-packages/*.dist-info"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep two runs of make out of each other's way; the kernel drops a dead one's lock."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step("wait for another make that sets up here"):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what starts, and how long it took."""
    print(f"==> {what}", flush=True)
    begun = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - begun:.1f} s", flush=True)
