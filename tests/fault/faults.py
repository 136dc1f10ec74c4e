"""How processes of a cluster are struck, and what is seen of a request from outside."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.flow.cluster_process import Cluster
from tests.flow.stream import Stream
from tests.waiting import await_that

Kind = Literal["kill", "stop"]
KINDS: tuple[Kind, Kind] = ("kill", "stop")
# A prompt that is always computed on P: its KV is 49 MB, which TCP moves in about 0.1 s.
LONG = [(i * 7919) % 40_000 + 100 for i in range(3000)]
LONG_ANSWER = 40
# A prompt that D computes itself.
SHORT = list(range(300, 364))
SHORT_ANSWER = 200

# Blocks of a dead reader stay for so long: long enough to be stopped and go on in.
LEASE_S = 12

_names = itertools.count()


def ask(cluster: Cluster, prompt: list[int], n: int, salt: str, **more: Any) -> Stream:
    """A greedy stream under its own name; nothing is cached under a salt that is new."""
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": n, "temperature": 0}
    body |= {"ignore_eos": True, "cache_salt": salt, **more}
    return Stream(cluster.url, "/v1/completions", body, f"fault-{next(_names)}-{salt}")


def ask_long(cluster: Cluster, salt: str) -> Stream:
    return ask(cluster, LONG, LONG_ANSWER, salt)


def ask_short(cluster: Cluster, salt: str) -> Stream:
    return ask(cluster, SHORT, SHORT_ANSWER, salt)


def decision(cluster: Cluster, stream: Stream) -> dict[str, Any]:
    """The audit's record of a stream, which may still run."""
    name = stream.name_asked

    def find() -> dict[str, Any] | None:
        records = cluster.get("/admin/decisions")["decisions"]
        return next((r for r in reversed(records) if r["request_id"] == name), None)

    found: dict[str, Any] = await_that(find, f"decision on {name}")
    return found


def pair(cluster: Cluster, record: dict[str, Any]) -> tuple[str, str]:
    """Who serves a request that was planned remote."""
    assert record["plan"].startswith("remote"), record["plan"]
    return record["prefill"], record["decode"]


def decodes(cluster: Cluster, stream: Stream) -> str:
    """The decode replica of a stream that was planned once."""
    record = decision(cluster, stream)
    if record["plan"].startswith("remote"):
        return pair(cluster, record)[1]
    return str(record["plan"].split("@")[-1].split(";")[0])


@contextlib.contextmanager
def struck(kind: Kind, *pids: int) -> Iterator[set[int]]:
    """Processes that are dead, or stand still while the block lasts; the pids of the dead."""
    sent = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
    for pid in pids:
        os.kill(pid, sent)
    try:
        yield set(pids) if kind == "kill" else set()
    finally:
        for pid in pids if kind == "stop" else ():
            _go_on(pid)


@dataclass(frozen=True)
class Reading:
    """A request whose KV is half way: its prefill replica stands still."""

    stream: Stream
    salt: str
    prefill: dict[str, Any]
    decode: dict[str, Any]


@contextlib.contextmanager
def half_way(cluster: Cluster, salt: str) -> Iterator[Reading]:
    """A long request, held while D reads P's blocks over TCP: part of the bytes are over, and
    P, which would send the rest, is stopped until the block ends (should it live so long)."""
    for attempt in range(8):
        stream = ask_long(cluster, f"{salt}-{attempt}")
        names, rows = pair(cluster, decision(cluster, stream)), cluster.replicas()
        prefill, decode = (rows[name] for name in names)
        whole = len(LONG) // 32 * 32 * prefill["kv_bytes_per_token"]
        if not _stop_at(prefill["pid"], whole):
            _go_on(prefill["pid"])
            stream.done()
            continue
        try:
            yield Reading(stream, f"{salt}-{attempt}", prefill, decode)
        finally:
            _go_on(prefill["pid"])
        return
    raise AssertionError("no transfer was caught half way")


def _stop_at(pid: int, whole: int) -> bool:
    """Stop a process when a fifth of `whole` has crossed loopback; whether that was in time."""
    began, deadline = loopback_bytes(), time.monotonic() + 20
    while loopback_bytes() - began < whole // 5:
        assert time.monotonic() < deadline, "nothing was transferred"
        time.sleep(0.0005)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.1)  # what is in the sockets arrives
    return loopback_bytes() - began < whole * 9 // 10


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def loopback_bytes() -> int:
    """Bytes that loopback has carried since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    line = next(line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])
