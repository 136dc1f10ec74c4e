"""What the cluster adds to one plain vLLM API server, and what its ingress costs.

One decode engine behind one ingress against vLLM's own server over one engine: same model, engine
options and environment. Prompts of 200 tokens are in the cache, so that an engine computes next to
nothing and the way to it shows. Both are up; they are loaded in turns, and the one that is not
stands still.
"""

import asyncio
import contextlib
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from benchmarks.serve import clusters, load
from benchmarks.serve.clusters import Server
from benchmarks.serve.result import Row, Store, at_least, at_most, shown, spread
from benchmarks.serve.texts import words

PORT_PLAIN, PORT_OURS = 18140, 18141
CHAT = "/v1/chat/completions"
CONCURRENCY = 8
# With the chat template, a prompt of 200 tokens: 6 whole blocks of 32, and 8 tokens to compute.
_WORDS = 169
_CACHED_TOKENS = 192
_PROMPTS = 8
_ANSWER_TOKENS = 64
# One more ingress replica takes about so much memory.
_INGRESS_BYTES = 1.2e9


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: requests of one block, alone and at concurrency 8, and its repeats."""

    alone: int
    together: int
    repeats: int
    replicas: tuple[int, ...]


FULL = Size(alone=5, together=16, repeats=7, replicas=(1, 2, 4))
QUICK = Size(alone=4, together=16, repeats=1, replicas=(1,))


def measure(quick: bool) -> list[Row]:
    """Rows of this part; what was measured of this commit is not measured again."""
    store, size = Store("overhead", quick), QUICK if quick else FULL
    with contextlib.ExitStack() as stack:
        plain: list[Server] = []
        for replicas in size.replicas:
            repeats = size.repeats if replicas == 1 else max(1, size.repeats // 3)
            if all(f"{name}-{replicas}-{n}" in store for name in _NAMES for n in range(repeats)):
                continue
            if replicas > 1 and psutil.virtual_memory().available < 6e9 + replicas * _INGRESS_BYTES:
                print(f"    {replicas} ingress replicas left out: too little memory", flush=True)
                continue
            if not plain:
                plain.append(stack.enter_context(clusters.plain(PORT_PLAIN, quick)))
            _alternate(store, plain[0], replicas, repeats, quick)
    return _rows(store, size)


_NAMES = ("ours", "plain")


def _alternate(store: Store, plain: Server, replicas: int, repeats: int, quick: bool) -> None:
    size = QUICK if quick else FULL
    sections = {
        "prefill": {"replicas": 0},
        "decode": {"replicas": 1},
        "ingress": {"replicas": replicas},
    }
    with clusters.ours(f"ours, {replicas} ingress", PORT_OURS, sections, quick) as ours:
        for number in range(repeats):
            turns = ((ours, plain, "ours"), (plain, ours, "plain"))
            # First one, then the other: what drifts does not always meet the same.
            for server, other, name in turns if number % 2 == 0 else turns[::-1]:
                with other.paused():
                    alone = size.alone if replicas == 1 else 0
                    measured = partial(block, server, alone, size.together)
                    store.get(f"{name}-{replicas}-{number}", measured)
                other.rested()


def block(server: Server, alone: int, together: int) -> dict[str, Any]:
    """One server under both loads, of so many requests each."""
    return asyncio.run(_block(server, alone, together))


async def _block(server: Server, alone: int, together: int) -> dict[str, Any]:
    rng = random.Random(200)
    prompts = [words(rng, _WORDS) for _ in range(_PROMPTS)]
    async with load.client(server.url) as client:
        # Twice: the second time finds every prompt in the cache, also behind other frontends.
        warm = [_body(prompt, 4) for prompt in prompts]
        await load.closed_loop(client, CHAT, warm, 1)
        await load.closed_loop(client, CHAT, warm, CONCURRENCY)
        done = {}
        if alone:
            done["alone"] = await _load(client, server, prompts, alone, 1)
        done["together"] = await _load(client, server, prompts, together, CONCURRENCY)
    return done


async def _load(
    client: load.Client, server: Server, prompts: Sequence[str], count: int, concurrency: int
) -> dict[str, Any]:
    bodies = [_body(prompts[n % len(prompts)], _ANSWER_TOKENS) for n in range(count)]
    frontends, everyone = server.frontends(), server.processes()
    before = [clusters.cpu_s([each]) for each in frontends]
    everyone_s = clusters.cpu_s(everyone)
    done = await load.closed_loop(client, CHAT, bodies, concurrency)
    missed = [a.cached_tokens for a in done.answers if a.cached_tokens < _CACHED_TOKENS]
    if missed:
        raise RuntimeError(f"{server.name}: prompts not in the cache: {missed} tokens cached")
    return {
        "prompt_tokens": done.answers[0].prompt_tokens,
        "requests": count,
        "wall_s": done.wall_s,
        "generated_tokens": done.generated_tokens,
        "ttft_s": [round(a.ttft_s, 5) for a in done.answers],
        "itl_s": [round(statistics.fmean(a.gaps_s), 6) for a in done.answers],
        "gaps_s": [round(gap, 5) for a in done.answers for gap in a.gaps_s],
        "frontends_cpu_s": [
            clusters.cpu_s([each]) - b for each, b in zip(frontends, before, strict=True)
        ],
        "all_cpu_s": clusters.cpu_s(everyone) - everyone_s,
        "client_share": done.client_share,
    }


def _body(prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": "smollm2",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


# ------------------------------------------------------------------ from blocks to rows


def _rows(store: Store, size: Size) -> list[Row]:
    ours, plain = _blocks(store, "ours", 1), _blocks(store, "plain", 1)
    return [
        *_latency(ours, plain, "alone", targets=True),
        *_latency(ours, plain, "together", targets=False),
        *_throughput(ours, plain),
        *[row for replicas in size.replicas for row in _ingress(store, replicas)],
        _client(ours, plain),
    ]


def _blocks(store: Store, name: str, replicas: int) -> list[dict[str, Any]]:
    keys = [f"{name}-{replicas}-{number}" for number in range(FULL.repeats)]
    return [store.kept(key) for key in keys if key in store]


def _latency(
    ours: list[dict[str, Any]], plain: list[dict[str, Any]], when: str, targets: bool
) -> list[Row]:
    ttft = [_medians(blocks, when, "ttft_s") for blocks in (ours, plain)]
    # Of each answer the mean: bytes that arrive together must not hide what they waited.
    itl = [_medians(blocks, when, "itl_s") for blocks in (ours, plain)]
    added_ms = [1000 * (a - b) for a, b in zip(*ttft, strict=True)]
    added = [100 * (a / b - 1) for a, b in zip(*itl, strict=True)]
    level = "alone" if when == "alone" else f"at concurrency {CONCURRENCY}"
    names = (f"added p50 TTFT, {level}", f"added p50 ITL, {level}")
    details = (
        f"{spread(added_ms, 'ms')}; plain {_ms(ttft[1])}, ours {_ms(ttft[0])}",
        f"{spread(added, '%')}; plain {_ms(itl[1])}, ours {_ms(itl[0])}",
    )
    values = (statistics.median(added_ms), statistics.median(added))
    if not targets:
        return [
            shown(names[0], values[0], "ms", details[0]),
            shown(names[1], values[1], "%", details[1]),
        ]
    return [
        at_most(names[0], values[0], "ms", 5.0, details[0]),
        at_most(names[1], values[1], "%", 5.0, details[1]),
    ]


def _throughput(ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[Row]:
    rates = [[_rate(block) for block in blocks] for blocks in (ours, plain)]
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    detail = (
        f"{spread(ratios)}; plain {statistics.median(rates[1]):.0f}, "
        f"ours {statistics.median(rates[0]):.0f} tokens/s"
    )
    name = f"throughput at concurrency {CONCURRENCY}, against plain"
    return [at_least(name, statistics.median(ratios), "x", 0.95, detail)]


def _ingress(store: Store, replicas: int) -> list[Row]:
    """CPU of the processes that take HTTP, and what the cluster gives, by ingress replicas."""
    ours, plain = _blocks(store, "ours", replicas), _blocks(store, "plain", replicas)
    if not ours:
        return []
    costs = [[_cpu_ms(block) for block in blocks] for blocks in (ours, plain)]
    ratios = [a / b for a, b in zip(*costs, strict=True)]
    name = f"CPU per request, {replicas} ingress against plain's API server"
    detail = (
        f"{spread(ratios)}; plain {statistics.median(costs[1]):.1f}, "
        f"ours {statistics.median(costs[0]):.1f} ms of CPU for {_ANSWER_TOKENS} tokens"
    )
    value = statistics.median(ratios)
    first = (
        at_most(name, value, "x", 1.1, detail) if replicas == 1 else shown(name, value, "x", detail)
    )
    rates = [_rate(a) / _rate(b) for a, b in zip(ours, plain, strict=True)]
    everyone = [
        a["together"]["all_cpu_s"] / b["together"]["all_cpu_s"]
        for a, b in zip(ours, plain, strict=True)
    ]
    counts = f"{replicas} ingress"
    return [
        first,
        shown(
            f"throughput, {counts}, against plain",
            statistics.median(rates),
            "x",
            f"{spread(rates)}; share of the busiest ingress {_busiest(ours):.2f}",
        ),
        shown(
            f"CPU of all processes, {counts}, against plain's",
            statistics.median(everyone),
            "x",
            spread(everyone),
        ),
    ]


def _client(ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Row:
    shares = [block["together"]["client_share"] for block in (*ours, *plain)]
    return shown("the load generator's own CPU", max(shares), "cores", spread(shares))


def _medians(blocks: list[dict[str, Any]], when: str, what: str) -> list[float]:
    return [statistics.median(block[when][what]) for block in blocks]


def _rate(block: dict[str, Any]) -> float:
    return float(block["together"]["generated_tokens"] / block["together"]["wall_s"])


def _cpu_ms(block: dict[str, Any]) -> float:
    loaded = block["together"]
    return 1000 * float(sum(loaded["frontends_cpu_s"])) / int(loaded["requests"])


def _busiest(blocks: list[dict[str, Any]]) -> float:
    each = [block["together"]["frontends_cpu_s"] for block in blocks]
    return float(statistics.median(max(shares) / sum(shares) for shares in each))


def _ms(values_s: Sequence[float]) -> str:
    return f"{1000 * statistics.median(values_s):.1f} ms"
