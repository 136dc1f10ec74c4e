"""A node as far as processes can tell: a network, a /dev/shm and a process table of its own.

All processes of a node hang on one, its first: when that ends the kernel kills the others, and it
ends when whoever made the node does, by a crash too.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.links.network import End, LinkRefusedError, die_with_parent, entered, first_line
from benchmarks.result import ROOT


class Node:
    """Made by `node`; see the module."""

    def __init__(self, end: End, first: psutil.Process) -> None:
        self.end, self._first = end, first
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """By which the other end reaches it."""
        return self.end.address

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs these words on the node, in this checkout's folder."""
        entering = ["nsenter", "--target", str(self._first.pid)]
        entering += ["--mount", "--net", "--ipc", "--pid", "--"]
        return [*entering, "env", "--chdir", str(ROOT), *words]

    def start(
        self, words: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A process of the node, whose words go to `log`. What is returned stands outside of it:
        signals are for `inner`."""
        told = {**os.environ, **(env or {})}
        with log.open("ab") as out:
            made = subprocess.Popen(self.command(words), env=told, stdout=out, stderr=out)
        self._started.append(made)
        return made

    def run(
        self,
        words: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """A command of the node, until it ends."""
        return subprocess.run(
            self.command(words),
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ended(self) -> None:
        """The node is gone: wait for what stood outside of it."""
        for process in self._started:
            process.wait()

    def network(self) -> contextlib.AbstractContextManager[None]:
        """Sockets that this thread opens meanwhile are the node's."""
        return entered(self.end)


@contextlib.contextmanager
def node(end: End, shm_bytes: int = 4 << 30) -> Iterator[Node]:
    """A node at one end of a link, until the block ends; `shm_bytes` bounds its /dev/shm."""
    words = ["ip", "netns", "exec", end.namespace, "unshare", "--mount", "--ipc", "--pid"]
    words += ["--fork", "--kill-child", "--mount-proc"]
    outer = subprocess.Popen(
        [*words, sys.executable, str(Path(__file__).with_name("first.py")), str(shm_bytes)],
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    made = None
    try:
        said = first_line(outer)
        if said != b"up\n":
            raise LinkRefusedError("a node's namespaces cannot be made here; see the words above")
        [first] = psutil.Process(outer.pid).children()
        made = Node(end, first)
        yield made
    finally:
        outer.kill()
        outer.wait()
        if made is not None:
            made.ended()


def inner(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The process of a node behind what `Node.start` returned, as this machine counts it."""
    [found] = psutil.Process(process.pid).children()
    return found
