"""What the cluster adds to one plain vLLM API server.

One decode engine behind one ingress against vLLM's own server over one engine: same model, engine
options and environment. Prompts of 200 tokens are in the cache, so that an engine computes next to
nothing and the way to it shows. Both are up; they are loaded in turns, and the one that is not
stands still.
"""

import asyncio
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from benchmarks.result import Row, Store, at_least, at_most, shown, spread
from benchmarks.serve import clusters, load
from benchmarks.serve.clusters import Server
from benchmarks.serve.texts import words

PORT_PLAIN, PORT_OURS = 18140, 18141
CHAT = "/v1/chat/completions"
CONCURRENCY = 8
# With the chat template, a prompt of 200 tokens: 6 whole blocks of 32, and 8 tokens to compute.
_WORDS = 169
_CACHED_TOKENS = 192
_PROMPTS = 8
ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Size:
    """Requests of one block, alone and at concurrency 8, and how many blocks each server gets."""

    alone: int
    together: int
    repeats: int


FULL = Size(alone=5, together=16, repeats=8)
QUICK = Size(alone=4, together=16, repeats=1)


def measure(quick: bool) -> list[Row]:
    """Rows of this part; what was measured of this commit is not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    if any(_key(name, n) not in store for name in NAMES for n in range(size.repeats)):
        sections = {"prefill": {"replicas": 0}, "decode": {"replicas": 1}}
        with (
            clusters.plain(PORT_PLAIN, quick) as plain,
            clusters.ours("ours", PORT_OURS, sections, quick) as ours,
        ):
            for number, server, name in in_turns(ours, plain, size.repeats):
                store.get(_key(name, number), partial(block, server, size.alone, size.together))
    return _rows(store, size)


NAMES = ("ours", "plain")


def _key(name: str, number: int) -> str:
    return f"{name}-{number}"


def in_turns(ours: Server, plain: Server, repeats: int) -> Iterator[tuple[int, Server, str]]:
    """Each server in its turn, while the other one stands still. First one, then the other comes
    first: what drifts does not always meet the same."""
    for number in range(repeats):
        turns = ((ours, plain, "ours"), (plain, ours, "plain"))
        for server, other, name in turns if number % 2 == 0 else turns[::-1]:
            with other.paused():
                yield number, server, name
            other.rested()


def block(server: Server, alone: int, together: int) -> dict[str, Any]:
    """One server under both loads, of so many requests each."""
    return asyncio.run(_block(server, alone, together))


async def _block(server: Server, alone: int, together: int) -> dict[str, Any]:
    async with load.client(server.url) as client:
        await warm(client)
        return {
            "alone": await loaded(client, server, alone, 1),
            "together": await loaded(client, server, together, CONCURRENCY),
        }


@cache
def _prompts() -> list[str]:
    rng = random.Random(200)
    return [words(rng, _WORDS) for _ in range(_PROMPTS)]


async def warm(client: load.Client) -> None:
    """Bring every prompt into the engine's cache, and every connection into use."""
    bodies = [_body(prompt, 4) for prompt in _prompts()]
    await load.closed_loop(client, CHAT, bodies, 1)
    await load.closed_loop(client, CHAT, bodies, CONCURRENCY)


async def loaded(
    client: load.Client, server: Server, count: int, concurrency: int
) -> dict[str, Any]:
    """`count` requests at a time of `concurrency`, and what they took of whom. Raises
    `RuntimeError` when a prompt was not in the cache."""
    prompts = _prompts()
    bodies = [_body(prompts[n % len(prompts)], ANSWER_TOKENS) for n in range(count)]
    frontends, everyone = server.frontends(), server.processes()
    before = [clusters.cpu_s([each]) for each in frontends]
    everyone_s = clusters.cpu_s(everyone)
    done = await load.closed_loop(client, CHAT, bodies, concurrency)
    frontends_s = [clusters.cpu_s([p]) - b for p, b in zip(frontends, before, strict=True)]
    everyone_s = clusters.cpu_s(everyone) - everyone_s
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
        "frontends_cpu_s": frontends_s,
        "all_cpu_s": everyone_s,
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
    ours, plain = (
        [store.kept(_key(name, number)) for number in range(size.repeats)] for name in NAMES
    )
    together = [[block["together"] for block in blocks] for blocks in (ours, plain)]
    return [
        *_latency(ours, plain, "alone", targets=True),
        *_latency(ours, plain, "together", targets=False),
        *_throughput(*together),
        cpu_row("CPU of the ingress per request, real engine", *together),
        everyone_row("CPU of all processes, real engine", *together),
        client_row(*together),
    ]


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
    rates = [[rate(block) for block in blocks] for blocks in (ours, plain)]
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    detail = (
        f"{spread(ratios)}; plain {statistics.median(rates[1]):.0f}, "
        f"ours {statistics.median(rates[0]):.0f} tokens/s"
    )
    name = f"throughput at concurrency {CONCURRENCY}, against plain"
    return [at_least(name, statistics.median(ratios), "x", 0.95, detail)]


def cpu_row(name: str, ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Row:
    """CPU of the processes that take HTTP, against plain's."""
    costs = [[cpu_ms(block) for block in blocks] for blocks in (ours, plain)]
    ratios = [a / b for a, b in zip(*costs, strict=True)]
    per_s = statistics.median(block["requests"] / block["wall_s"] for block in ours)
    detail = (
        f"{spread(ratios)}; plain {statistics.median(costs[1]):.1f}, ours "
        f"{statistics.median(costs[0]):.1f} ms for {ANSWER_TOKENS} tokens; {per_s:.1f} requests/s"
    )
    return at_most(f"{name}, against plain", statistics.median(ratios), "x", 1.1, detail)


def everyone_row(name: str, ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Row:
    """CPU of all processes, engines and Ray included, against plain's."""
    pairs = zip(ours, plain, strict=True)
    ratios = [a["all_cpu_s"] / b["all_cpu_s"] for a, b in pairs]
    return shown(f"{name}, against plain", statistics.median(ratios), "x", spread(ratios))


def client_row(ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Row:
    shares = [block["client_share"] for block in (*ours, *plain)]
    return shown("CPU of the load generator", max(shares), "cores", spread(shares))


def rate(block: dict[str, Any]) -> float:
    """Generated tokens a second."""
    return float(block["generated_tokens"] / block["wall_s"])


def cpu_ms(block: dict[str, Any]) -> float:
    """CPU of the processes that take HTTP, a request."""
    return 1000 * float(sum(block["frontends_cpu_s"])) / int(block["requests"])


def _medians(blocks: list[dict[str, Any]], when: str, what: str) -> list[float]:
    return [statistics.median(block[when][what]) for block in blocks]


def _ms(values_s: Sequence[float]) -> str:
    return f"{1000 * statistics.median(values_s):.1f} ms"
