"""Fetching blocks from another replica's host tier against raw NIXL between the same processes.

Raw is one batched NIXL job that reads the same rows, nothing else. A fetch has beside it its
messages, the lender's checksums and leases, and the reader's checksums. Both read into the same
memory, and repeats of both alternate. The lender is a process that lends out of plain memory, so
that no engine's computing is part of either.
"""

import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import zmq

from benchmarks.result import Row, at_least, shown, spread
from tests.peer.lending_process import FINGERPRINT, SECRET, key, lender
from workers import connector
from workers.peer.keys import peer_keys
from workers.peer.session import Session

# Blocks of 32 tokens: the default model's in fp32, one of a quarter of it, and a tiny model's.
SIZES = {"default": 1_474_560, "quarter": 368_640, "tiny": 32_768}
TOTAL_BYTES = 32 << 20
TARGET = 0.8
TIMEOUT_S = 30.0


def measure(quick: bool) -> list[Row]:
    """Rows of every block size."""
    connector.keep_on_network("127.0.0.1")
    # vLLM, which the tier imports, sets no affinity or threads of its own here.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    rows: list[Row] = []
    for name, row_bytes in SIZES.items():
        count = TOTAL_BYTES // row_bytes
        with lender(count, row_bytes) as (address, _):
            rows += _rows(name, address, count, row_bytes, 5 if quick else 25)
    return rows


def _rows(name: str, address: str, count: int, row_bytes: int, repeats: int) -> list[Row]:
    samples: dict[str, list[float]] = {"raw_read": [], "fetch": []}
    host = memoryview(bytearray(count * row_bytes)).cast("B", (count, row_bytes))
    size_bytes = count * row_bytes
    with (
        _session(address, host) as session,
        ThreadPoolExecutor(1) as verifying,
    ):
        # The first of each connects and touches memory for the first time.
        for turn in range(-1, repeats):
            for step in samples:
                begun = time.perf_counter()
                if step == "raw_read":
                    every = [(row, row) for row in range(count)]
                    session.read(every, time.monotonic() + TIMEOUT_S)
                else:
                    _fetch(session, verifying, host)
                if turn >= 0:
                    samples[step].append(size_bytes / (time.perf_counter() - begun) / 1e6)
    _check(host)
    rows = [
        shown(f"peer_{name}_{step}", statistics.median(found), "MB/s", spread(found))
        for step, found in samples.items()
    ]
    ratio = statistics.median(samples["fetch"]) / statistics.median(samples["raw_read"])
    detail = f"{count} blocks of {row_bytes} bytes a fetch, {repeats} repeats of each in turns"
    return [*rows, at_least(f"peer_{name}_ratio", ratio, "", TARGET, detail)]


@contextmanager
def _session(address: str, host: memoryview) -> Iterator[Session]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    deadline_s = time.monotonic() + TIMEOUT_S
    keys = peer_keys(SECRET).client
    with closing(Session(context, address, keys, FINGERPRINT, host, deadline_s)) as made:
        yield made
    context.term()


def _fetch(session: Session, verifying: ThreadPoolExecutor, host: memoryview) -> None:
    from workers.peer.tier import Load

    assert host.shape is not None
    count = host.shape[0]
    keys = [key(row) for row in range(count)]
    job: Any = SimpleNamespace(job_id=0, keys=keys, chunk_ids=np.arange(count))
    question: Any = SimpleNamespace(deadline_s=time.monotonic() + TIMEOUT_S, answers={})
    books: Any = SimpleNamespace(let_go=lambda rows: None)
    load = Load(job, question, host, books, verifying)
    load.run(session)
    assert load.result().success


def _check(host: memoryview) -> None:
    """What came is what the lender has."""
    found = np.frombuffer(host, np.uint8).reshape(host.shape)
    expected = (np.arange(host.shape[0] if host.shape else 0) + 1) % 256
    assert (found == expected[:, None]).all()
