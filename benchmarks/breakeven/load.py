"""Goodput of a mixed load by policy: agents, documents and chats that arrive in an open loop.

One prefill and one decode engine, with host tiers and a vault; the prefill engine's paged KV is
small, so that tiers matter. A first cluster tells what requests take when nothing else runs and
nothing is cached, which gives the targets and the unit of rates, and from which prefix on fetching
is quicker than computing by its own curves: that is what the static threshold is tuned to, as an
operator would by `breakeven calibrate`. The second cluster is started with it and takes all
windows. In a round each rate comes once by each policy, in turns: the same arrivals, in tokens of
their own.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

from benchmarks.breakeven.arrivals import Mix, Request, schedule
from benchmarks.breakeven.cells import COMPUTE, OURS, predictions
from benchmarks.breakeven.goodput import POLICIES, Targets, Window, rows, targets, unit_per_s
from benchmarks.breakeven.sending import arrive, one_by_one
from benchmarks.result import Row, Store, shown
from benchmarks.serve import clusters
from benchmarks.serve.clusters import Server

PORT = 18_700
# Each policy is judged by the first; the others say how much hangs on it.
MULTIPLES = (3.0, 2.0)
BLOCK_TOKENS = 32
MOST_TOKENS = 4096
# An abandoned request ends with its chunk, and what is stored goes to tiers.
_SETTLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Size:
    """Rates as multiples of the unit; seconds of arrivals in a window, and of warming up; lone
    requests of each kind; paged KV of either engine and host tiers, in bytes."""

    factors: tuple[float, ...]
    rounds: int
    seconds: float
    warm_s: float
    lone: int
    prefill_kv_bytes: int
    decode_kv_bytes: int
    host_bytes: int
    mix: Mix = field(default_factory=Mix)


_SHORT = Mix(
    system_tokens=64, turn_tokens=(32, 64), talk_tokens=256, document_tokens=(256, 384), asks=2
)
# Of the default model in float32, 5,400 and 10,900 tokens of paged KV, and 23,000 in a host tier:
# what agents and documents share is more than the prefill engine's. In trials the
# baselines' goodput grew no more from the second rate on.
FULL = Size((2.0, 4.0, 6.0), 3, 24.0, 12.0, 3, 250_000_000, 500_000_000, 1 << 30)
QUICK = Size((1.0,), 1, 1.0, 0.5, 1, 1 << 25, 1 << 25, 1 << 25, _SHORT)


def measure(quick: bool) -> list[Row]:
    """Rows of this part; windows that were measured at this commit are not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    if "lone" not in store:
        with _cluster(size, quick) as server:
            store.get("lone", partial(_lone, server, size))
    lone = store.kept("lone")
    unit = unit_per_s(lone, size.mix.shares())
    left = [turn for turn in turns(size) if _key(*turn) not in store]
    if left:
        with _cluster(size, quick, lone["crossover_tokens"]) as server:
            warming = schedule(size.mix, unit, size.warm_s, 0)
            _window(server, OURS, warming, size.warm_s, targets(lone, max(MULTIPLES)))
            for policy, factor, number in left:
                requests = schedule(size.mix, factor * unit, size.seconds, 100 + number)
                run = partial(
                    _window, server, policy, requests, size.seconds, targets(lone, MULTIPLES[0])
                )
                _tell(store.get(_key(policy, factor, number), run), policy, factor, lone)
    told = {turn: store.kept(_key(*turn)) for turn in turns(size)}
    windows = [window_of(each, *turn) for turn, each in told.items()]
    client_share = max(each["client_share"] for each in told.values())
    ours = [told[turn] for turn in turns(size) if turn[0] == OURS]
    pairs = [(said_s, took_s) for each in ours for said_s, took_s in each["predicted_s"]]
    found = [*rows(windows, MULTIPLES, lone), *predictions(pairs, "answered requests, all rates")]
    return [*found, *_basis(lone, unit, client_share)]


def turns(size: Size) -> list[tuple[str, float, int]]:
    """Policy, rate and round of each window, in their order: what drifts does not always meet the
    same policy."""
    return [
        (POLICIES[(number + place + step) % len(POLICIES)], factor, number)
        for number in range(size.rounds)
        for step, factor in enumerate(size.factors)
        for place in range(len(POLICIES))
    ]


def window_of(told: dict[str, Any], policy: str, factor: float, number: int) -> Window:
    """A window from what is kept of it."""
    return Window(policy, factor, number, told["seconds"], told["sent"])


def _key(policy: str, factor: float, number: int) -> str:
    return f"{policy}/{factor:g}/{number}"


def _cluster(
    size: Size, quick: bool, fetch_tokens: int | None = None
) -> AbstractContextManager[Server]:
    sections: dict[str, Any] = {
        "engine": {"max_model_len": MOST_TOKENS},
        "prefill": {"engine": {"kv_cache_memory_bytes": size.prefill_kv_bytes}},
        "decode": {"engine": {"kv_cache_memory_bytes": size.decode_kv_bytes}},
        "tiers": {
            "host": {"bytes": size.host_bytes},
            "vault": {"shards": 1, "memory_bytes": 2 * size.host_bytes},
        },
    }
    if fetch_tokens is not None:
        sections["router"] = {"fetch_tokens": fetch_tokens}
    return clusters.ours("1 prefill, 1 decode, tiers", PORT, sections, quick)


# ------------------------------------------------------------------ nothing else runs


def _lone(server: Server, size: Size) -> dict[str, Any]:
    """What requests of each kind take when nothing else runs, and the prefix from which on the
    threshold is to fetch."""
    clusters.go_by(server, COMPUTE)
    sent = asyncio.run(one_by_one(server.url, size.mix, size.lone))
    return {
        "ttft_s": {kind: [each["ttft_s"] for each in of_kind] for kind, of_kind in sent.items()},
        "gaps_s": [each["gap_s"] for of_kind in sent.values() for each in of_kind],
        "crossover_tokens": _crossover_tokens(server),
    }


def _crossover_tokens(server: Server) -> int:
    """By the prefill replica's curves, in whole blocks; of its tiers the one where it is longest:
    the rule does not look at which one a prefix lies in."""
    with urllib.request.urlopen(f"{server.url}/admin/curves", timeout=10) as answer:
        replicas = json.load(answer)["tiers"]
    [tiers] = [told.values() for name, told in replicas.items() if name.startswith("prefill")]
    found = [tier["crossover_tokens"] for tier in tiers]
    longest = MOST_TOKENS if None in found else max(found)
    return max(1, ceil(longest / BLOCK_TOKENS)) * BLOCK_TOKENS


# ------------------------------------------------------------------ one window


def _window(
    server: Server, policy: str, requests: Sequence[Request], seconds: float, wanted: Targets
) -> dict[str, Any]:
    clusters.go_by(server, policy)
    done = asyncio.run(arrive(server.url, requests, seconds, wanted))
    time.sleep(_SETTLE_S)
    return {**done, "predicted_s": _predicted_s(server, len(requests))}


def _predicted_s(server: Server, requests: int) -> list[tuple[float, float]]:
    """Predicted and actual seconds to the first token of those among the last requests that had
    one."""
    query = f"limit={max(1, min(1000, requests))}"
    with urllib.request.urlopen(f"{server.url}/admin/decisions?{query}", timeout=10) as answer:
        rows = json.load(answer)["decisions"]
    timed = [(row["predicted_ttft_s"], row["ttft_s"]) for row in rows]
    return [(said_s, took_s) for said_s, took_s in timed if took_s is not None]


def _tell(told: dict[str, Any], policy: str, factor: float, lone: dict[str, Any]) -> None:
    window = Window(policy, factor, 0, told["seconds"], told["sent"])
    good = ", ".join(f"{window.goodput(targets(lone, m)):.2f} at {m:g}x" for m in MULTIPLES)
    offered = len(window.sent) / window.seconds
    print(f"    {policy}: {good} of {offered:.2f} a second, in {told['wall_s']:.0f} s", flush=True)


def _basis(lone: dict[str, Any], unit: float, client_share: float) -> list[Row]:
    """What targets and rates are multiples of; and what the client took of a core."""
    wanted = targets(lone, 1.0)
    each = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in wanted.ttft_s.items())
    least = lone["crossover_tokens"]
    return [
        shown("unit of rates", unit, "1/s", f"computed whole on one engine, by kind: {each}"),
        shown("time between tokens of a lone answer", 1000 * wanted.gap_s, "ms", "its mean"),
        shown("the threshold's tokens", least, "tokens", "the curves' crossover in this run"),
        shown("the client's share of a core", client_share, "share", "in the busiest window"),
    ]
