"""Processes that stand still while others are measured."""

import contextlib
import signal
from collections.abc import Iterator, Sequence

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Signal those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextlib.contextmanager
def pause(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """All of them stand still meanwhile."""
    send(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        send(processes, signal.SIGCONT)
