"""A vault shard's put and get against raw NIXL between the same two processes.

`python benchmarks/tiers/vault.py` prints its rows; `--write` keeps them as results/vault.json. Raw
is one batched NIXL job over the same memory and the same block sizes, nothing else. Put has beside
it its messages and the shard's checksums, and evicts and overwrites what was there; get has its
messages and the client's checksums. Neither has a codec: frames lie ready where they are sent from,
and stay where they come. `copied_put` copies each frame there first. Repeats of all alternate.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

# Run as a program: the packages are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import zmq

from benchmarks.result import Row, at_least, commit, machine, shown, spread
from kv.codecs.frame import HEADER_BYTES
from kv.vault.arena import Extent
from tests.unit.kv.vault_frames import frame_of
from tests.vault.shard_process import FINGERPRINT, MIB, SECRET, ShardHandle, client, shard
from workers import connector
from workers.vault import keys
from workers.vault.client import VaultClient
from workers.vault.jobs import Block
from workers.vault.line import Session
from workers.vault.region import READ, WRITE

RESULTS = Path(__file__).parent / "results"
# Frames of 32 tokens: the default model's in fp32, in int8, and a tiny model's.
SIZES = {"raw": 1_474_624, "int8": 391_744, "tiny": 65_600}
JOB_BYTES, MEMORY_BYTES = 32 * MIB, 256 * MIB
TARGET = 0.8
TIMEOUT_S = 30.0


def measure(quick: bool) -> list[Row]:
    """Rows of every block size."""
    rows: list[Row] = []
    connector.keep_on_network("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        for name, n_bytes in SIZES.items():
            with (
                shard(
                    Path(folder), f"vault-{name}", memory_bytes=MEMORY_BYTES, policy="lru"
                ) as one,
                client(one, staging_bytes=2 * JOB_BYTES) as vault,
            ):
                rows += _rows(name, n_bytes, one, vault, 3 if quick else 15)
    return rows


def _rows(
    name: str, n_bytes: int, handle: ShardHandle, vault: VaultClient, repeats: int
) -> list[Row]:
    count = JOB_BYTES // n_bytes
    # All alike, so that wherever one is sent from its payload lies there already.
    frames = [frame_of(1, n_bytes)] * count
    size_bytes = sum(map(len, frames))
    session = Session(
        zmq.Context(), handle.seat.address, keys.client_keys(SECRET), FINGERPRINT, 2 * JOB_BYTES
    )
    # At the end of the memory, where the vault puts nothing before it is full.
    parts = [
        (at * len(frame), [Extent(MEMORY_BYTES - size_bytes + at * len(frame), len(frame))])
        for at, frame in enumerate(frames)
    ]
    turns = itertools.count()

    def raw(direction: str) -> Callable[[Sequence[bytes]], None]:
        return lambda _: session.move(direction, parts, time.monotonic() + TIMEOUT_S)

    def copied_put(names: Sequence[bytes]) -> None:
        put([b"copied" + key for key in names], copied=True)

    def put(names: Sequence[bytes], copied: bool = False) -> None:
        blocks = [_block(key, frame, copied) for key, frame in zip(names, frames, strict=True)]
        stored = vault.put(b"run", "tag", "raw", blocks, TIMEOUT_S)
        assert {verdict.outcome for verdict in stored} == {"stored"}, stored

    def get(names: Sequence[bytes]) -> None:
        assert len(vault.get(b"run", names, lambda key, frame: None, TIMEOUT_S)) == count

    # Writing raw first: it must not land on what is read afterwards.
    steps = {
        "raw_write": raw(WRITE),
        "copied_put": copied_put,
        "put": put,
        "raw_read": raw(READ),
        "get": get,
    }
    samples: dict[str, list[float]] = {step: [] for step in steps}
    for turn in range(-1, repeats):
        names = [b"%d-%d" % (next(turns), at) for at in range(count)]
        for step, action in steps.items():
            begun = time.perf_counter()
            action(names)
            # The first of each connects and touches memory for the first time.
            if turn >= 0:
                samples[step].append(size_bytes / (time.perf_counter() - begun) / 1e9)
    session.close()
    rows = [
        shown(f"{name}_{step}", statistics.median(found), "GB/s", spread(found))
        for step, found in samples.items()
    ]
    for ours, theirs in (("put", "raw_write"), ("get", "raw_read")):
        ratio = statistics.median(samples[ours]) / statistics.median(samples[theirs])
        detail = f"{count} blocks of {len(frames[0])} bytes a job"
        rows.append(at_least(f"{name}_{ours}_ratio", ratio, "", TARGET, detail))
    return rows


def _block(key: bytes, frame: bytes, copied: bool) -> Block:
    n_bytes = len(frame) if copied else HEADER_BYTES

    def fill(into: memoryview) -> None:
        into[:n_bytes] = frame[:n_bytes]

    return Block(key, None, len(frame), 1.0, fill)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the rows as a result")
    arguments = parser.parse_args()
    rows = measure(quick=os.environ.get("QUICK", "0") not in ("", "0"))
    for row in rows:
        print(row.line())
    if arguments.write:
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        report = {"machine": machine(), "commit": commit(), "date": date}
        report["rows"] = [asdict(row) for row in rows]
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "vault.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
