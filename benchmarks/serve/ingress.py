"""What the ingress costs where it is the ingress that is busy, and how it scales with replicas.

A tiny model's engine answers far quicker than the default one's, so that tokenizing, routing and
streaming weigh. The load is that of `overhead`, at a higher concurrency; against vLLM's own server
over the same tiny model. At rest counts too: a process that does nothing takes its share of a slow
engine's requests.
"""

import asyncio
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from benchmarks.result import Row, Store, shown, spread
from benchmarks.serve import clusters, load
from benchmarks.serve.clusters import Server
from benchmarks.serve.overhead import (
    NAMES,
    client_row,
    cpu_row,
    everyone_row,
    in_turns,
    loaded,
    rate,
    warm,
)

PORT_PLAIN, PORT_OURS = 18145, 18146
CONCURRENCY = 16
REST_S = 5.0
# One more ingress replica, and the rest of a cluster.
_INGRESS_BYTES, _REST_BYTES = 1.2e9, 5e9


@dataclass(frozen=True, slots=True)
class Size:
    """Requests of one block; blocks by the number of ingress replicas."""

    requests: int
    repeats: dict[int, int]


FULL = Size(requests=160, repeats={1: 5, 2: 3, 4: 3})
QUICK = Size(requests=48, repeats={1: 1})


def measure(quick: bool) -> list[Row]:
    """Rows of this part; what was measured of this commit is not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    left = [
        replicas
        for replicas, repeats in size.repeats.items()
        if any(_key(name, replicas, n) not in store for name in NAMES for n in range(repeats))
    ]
    if left:
        with clusters.plain(PORT_PLAIN, quick=True) as plain:
            for replicas in left:
                _alternate(store, plain, replicas, size)
    return _rows(store, size)


def _key(name: str, replicas: int, number: int) -> str:
    return f"{name}-{replicas}-{number}"


def _alternate(store: Store, plain: Server, replicas: int, size: Size) -> None:
    if psutil.virtual_memory().available < _REST_BYTES + replicas * _INGRESS_BYTES:
        print(f"    {replicas} ingress replicas left out: too little memory", flush=True)
        return
    sections = {
        "prefill": {"replicas": 0},
        "decode": {"replicas": 1},
        "ingress": {"replicas": replicas},
    }
    with clusters.ours(f"{replicas} ingress", PORT_OURS, sections, quick=True) as ours:
        for number, server, name in in_turns(ours, plain, size.repeats[replicas]):
            store.get(_key(name, replicas, number), partial(block, server, size.requests))


def block(server: Server, requests: int) -> dict[str, Any]:
    """One server at rest, then under load."""
    return asyncio.run(_block(server, requests))


async def _block(server: Server, requests: int) -> dict[str, Any]:
    async with load.client(server.url) as client:
        await warm(client)
        frontends = server.frontends()
        rest_s, began_s = clusters.cpu_s(frontends), time.monotonic()
        await asyncio.sleep(REST_S)
        rest = (clusters.cpu_s(frontends) - rest_s) / (time.monotonic() - began_s)
        return {**await loaded(client, server, requests, CONCURRENCY), "rest_cores": rest}


# ------------------------------------------------------------------ from blocks to rows


def _rows(store: Store, size: Size) -> list[Row]:
    rows = []
    for replicas, repeats in size.repeats.items():
        ours, plain = (
            [
                store.kept(key)
                for number in range(repeats)
                if (key := _key(name, replicas, number)) in store
            ]
            for name in NAMES
        )
        if ours:
            rows += _of(f"{replicas} ingress", ours, plain)
    return rows


def _of(what: str, ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[Row]:
    rates = [rate(a) / rate(b) for a, b in zip(ours, plain, strict=True)]
    rest = [[1000 * block["rest_cores"] for block in blocks] for blocks in (ours, plain)]
    throughput = (
        f"{spread(rates)}; {statistics.median(map(rate, ours)):.0f} tokens/s; "
        f"the busiest ingress has {_busiest(ours):.0%} of their CPU"
    )
    return [
        cpu_row(f"CPU per request, tiny engine, {what}", ours, plain),
        shown(
            f"throughput, tiny engine, {what}, against plain",
            statistics.median(rates),
            "x",
            throughput,
        ),
        shown(
            f"CPU at rest, {what}",
            statistics.median(rest[0]),
            "ms/s",
            f"plain's API server {statistics.median(rest[1]):.1f} ms/s",
        ),
        everyone_row(f"CPU of all processes, tiny engine, {what}", ours, plain),
        client_row(ours, plain),
    ]


def _busiest(blocks: list[dict[str, Any]]) -> float:
    each = [block["frontends_cpu_s"] for block in blocks]
    return float(statistics.median(max(shares) / sum(shares) for shares in each))
