"""How far the catalogue lags, and what asking it costs: part of `make bench-serve`.

Three processes, as in a cluster: replicas (the real channel server, in front of a stand-in that
reports blocks as an engine does), the catalogue (the real node and server), and an ingress's line.
Every replica reports new and evicted blocks all the time. Alone:
`python benchmarks/serve/staleness.py [--quick]`.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kv.block import KEY_BYTES
from kv.catalogue import Tier
from router.catalogue.client import CatalogueLine
from router.catalogue.node import CatalogueNode
from router.catalogue.server import CatalogueServer
from router.catalogue.wire import Seat
from router.pauses import freeze_start
from workers.channel import ChannelLink
from workers.curve import client_keys, server_keys
from workers.messages import Inbox, Link, Load, Replica, Role
from workers.mirror import Change
from workers.server import ReplicaServer
from workers.sim import SimCosts, sim_replica

HOST = "127.0.0.1"
SECRET = bytes(32)
REPLICAS = 8
# Each replica reports so often, and so many blocks come and as many go each time.
REPORT_EVERY_S = 0.02
BLOCKS_A_REPORT = 64
PROMPT_BLOCKS = 128
# What the snapshots made wait is taken in, and out of the windows that a beat looks back on.
SETTLE_S = 32.0


@dataclass(frozen=True)
class Row:
    """One figure; `target` is None where none was asked for."""

    name: str
    value: float
    unit: str
    target: float | None
    ok: bool
    detail: str = ""


class Reporter:
    """What a channel server needs of an engine, over random blocks."""

    failure = None

    def __init__(self, blocks: int, seed: int) -> None:
        self._random = random.Random(seed)
        self.keys = self._random.randbytes(blocks * KEY_BYTES)
        self._gone = 0

    def stalled_s(self) -> float:
        return 0.0

    def snapshot(self, receiver: Callable[[dict[Tier, bytes]], None]) -> None:
        receiver({Tier.DEVICE: self.keys})

    def report(self) -> Any:
        """As one engine step says it: some blocks are new, the oldest are gone."""
        width = BLOCKS_A_REPORT * KEY_BYTES
        removed = self.keys[self._gone : self._gone + width]
        self._gone += width
        stored = self._random.randbytes(width)
        return SimpleNamespace(deltas=[], changes=(Change(stored, removed),), load=Load())


@dataclass(slots=True)
class Announced:
    """A directory that never changes."""

    known: Sequence[Any] = field(default_factory=tuple)

    async def replicas(self) -> Sequence[Replica]:
        return self.known

    async def catalogues(self) -> Sequence[Seat]:
        return self.known


def run_replicas(blocks: int, pipe: Connection) -> None:
    """Every replica, in one process; their addresses go up the pipe."""

    async def serve() -> None:
        replicas = []
        async with asyncio.TaskGroup() as tasks:
            for index in range(REPLICAS):
                server = ReplicaServer(HOST, server_keys(SECRET))
                replica = sim_replica(
                    f"decode-{index}", Role.DECODE, SimCosts(), address=server.address
                )
                engine = Reporter(blocks // REPLICAS, index)
                tasks.create_task(server.serve(engine, replica))  # type: ignore[arg-type]
                tasks.create_task(keep_reporting(server, engine))
                replicas.append(replica)
            pipe.send(replicas)

    async def keep_reporting(server: ReplicaServer, engine: Reporter) -> None:
        await asyncio.sleep(random.random() * REPORT_EVERY_S)
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            server.report(engine.report())

    asyncio.run(serve())


def run_catalogue(replicas: Sequence[Replica], pipe: Connection) -> None:
    """The catalogue process; where it listens goes up the pipe."""

    async def serve() -> None:
        now = asyncio.get_running_loop().time

        def connect(replica: Replica, inbox: Inbox) -> Link:
            return ChannelLink(replica.address, "catalogue", inbox, client_keys(SECRET), True)

        node = CatalogueNode(Announced(replicas), connect, now)
        freeze_start()
        server = CatalogueServer(HOST, server_keys(SECRET), node.holdings, node.beat, now)
        pipe.send(Seat("catalogue-0", "1", server.address, HOST))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(node.watch())
            tasks.create_task(server.serve())

    asyncio.run(serve())


async def look(seat: Seat, blocks: int, seconds: float) -> dict[str, Any]:
    """What an ingress sees: times of looks, and what the beats say, once the catalogue is full."""
    now = asyncio.get_running_loop().time
    line = CatalogueLine(Announced((seat,)), "ingress-0", HOST, client_keys(SECRET), now)
    watching = asyncio.create_task(line.watch())
    async with asyncio.timeout(120):
        while sum(line.beat.blocks.values()) < 0.99 * blocks:  # noqa: ASYNC110
            await asyncio.sleep(0.25)
    await asyncio.sleep(SETTLE_S)
    keys = random.Random(1).randbytes(PROMPT_BLOCKS * KEY_BYTES)
    times_us, lags_ms, unanswered = [], [], 0
    beat, began, cpu_s = line.beat, now(), time.process_time()
    while now() - began < seconds:
        asked = time.perf_counter()
        unanswered += await line.look(keys) is None
        times_us.append((time.perf_counter() - asked) * 1e6)
        if line.beat is not beat:
            beat = line.beat
            lags_ms.append(beat.lag_s * 1e3)
        await asyncio.sleep(0.002)
    cpu_us = (time.process_time() - cpu_s) / len(times_us) * 1e6
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return {
        "look_us": times_us,
        "lag_ms": lags_ms,
        "unanswered": unanswered,
        "line_cpu_us": cpu_us,
    }


def measured(blocks: int, seconds: float) -> dict[str, Any]:
    """One repeat, with processes of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    workers = context.Process(target=run_replicas, args=(blocks, there), daemon=True)
    workers.start()
    replicas = here.recv()
    catalogue = context.Process(target=run_catalogue, args=(replicas, there), daemon=True)
    catalogue.start()
    try:
        return asyncio.run(look(here.recv(), blocks, seconds))
    finally:
        for process in (catalogue, workers):
            process.kill()
            process.join()


def measure(quick: bool) -> list[Row]:
    """Rows of the catalogue's lag and of a look."""
    blocks, seconds, repeats = (200_000, 4.0, 2) if quick else (2_000_000, 20.0, 3)
    rounds = [measured(blocks, seconds) for _ in range(repeats)]
    churn = REPLICAS / REPORT_EVERY_S * BLOCKS_A_REPORT
    at = f"{blocks / 1e6:g} M blocks, {churn:.0f} new and as many evicted blocks/s"
    rows = [
        row(
            "staleness p99",
            [_at(r["lag_ms"], 0.99) for r in rounds],
            "ms",
            100.0,
            f"{at}; oldest change of each beat's window of 15 to 30 s, from report to catalogue",
        ),
        row(
            "look p50",
            [_at(r["look_us"], 0.5) for r in rounds],
            "us",
            None,
            "from one process to the other and back, encrypted; others are served meanwhile",
        ),
        row("look p99", [_at(r["look_us"], 0.99) for r in rounds], "us", None),
        row("looks unanswered", [float(r["unanswered"]) for r in rounds], "1", 0.0),
        row(
            "ingress CPU a look",
            [r["line_cpu_us"] for r in rounds],
            "us",
            None,
            "with the 2 ms timer between looks",
        ),
    ]
    return rows


def row(name: str, values: list[float], unit: str, target: float | None, detail: str = "") -> Row:
    """The median of repeats, with their spread."""
    value = median(values)
    spread = f"{min(values):.4g} to {max(values):.4g} over {len(values)} repeats"
    ok = target is None or value <= target
    return Row(name, round(value, 2), unit, target, ok, f"{spread}; {detail}" if detail else spread)


def _at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    rows = measure(parser.parse_args().quick)
    print(
        json.dumps({"load_average": os.getloadavg(), "rows": [asdict(r) for r in rows]}, indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
