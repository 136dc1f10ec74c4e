"""What batch requests (`service_tier: flex`) do to people, and what they get of what people leave.

One prefill and one decode engine, chunks of 128 tokens. All requests have one shape, prompts that
nobody shares and a short answer, so that throughput is counted in requests: first of batch requests
alone, which is saturation; then people arrive at half of that rate, at seeded times, with batch
requests beside them and without, in turns. Last, people talk in conversations that nearly fill the
paged KV, with and without: what of their prompts is cached is counted.
"""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.result import Row, Store, at_least, at_most, quantile, shown, spread
from benchmarks.serve import clusters, load
from benchmarks.serve.clusters import Server
from benchmarks.serve.texts import words

PORT = 22_610
PATH = "/v1/completions"
CHUNK_TOKENS = 128
# Of saturation, by people.
PEOPLE = 0.5
# Batch requests that clients keep open; the room decides how many of them run.
CLIENTS = 8
ANSWER_TOKENS = 32
_ENGINE = {"max_num_seqs": 16, "max_num_batched_tokens": CHUNK_TOKENS}
# 8,000 tokens of the default model in float32: a conversation of 1,500 has a sixth.
_SMALL_KV_BYTES, _LONGEST_TOKENS = 8000 * 46_080, 4096


@dataclass(frozen=True, slots=True)
class Size:
    """A prompt's tokens; seconds of saturation; arrivals in a window; windows of each kind;
    conversations, their turns, and the tokens that a turn adds."""

    prompt_tokens: int
    saturated_s: float
    arrivals: int
    repeats: int
    conversations: int
    turns: int
    turn_tokens: int


FULL = Size(1024, 60.0, 24, 3, conversations=4, turns=6, turn_tokens=250)
QUICK = Size(256, 4.0, 4, 1, conversations=2, turns=2, turn_tokens=64)


def measure(quick: bool) -> list[Row]:
    """Rows of this part; what was measured of this commit is not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    names = ["alone", "beside"]
    if any(f"{name}-{n}" not in store for name in names for n in range(size.repeats)):
        with _cluster(quick) as server:
            _windows(store, server, size)
    for name in names:
        if f"talk-{name}" not in store:
            # Each on a cluster of its own: what one has left in the cache is not the other's.
            small = {"kv_cache_memory_bytes": _SMALL_KV_BYTES, "max_model_len": _LONGEST_TOKENS}
            with _cluster(quick, **small) as server:
                store.get(f"talk-{name}", partial(talk, server, size, name == "beside"))
    return rows(store.kept, size)


def _cluster(quick: bool, **engine: Any) -> Any:
    sections = {
        "engine": {**_ENGINE, **engine},
        "prefill": {"replicas": 1, "engine": {"max_num_batched_tokens": CHUNK_TOKENS}},
        "decode": {"replicas": 1, "engine": {"max_num_batched_tokens": CHUNK_TOKENS}},
    }
    return clusters.ours("1 prefill, 1 decode, chunk 128", PORT, sections, quick)


def _windows(store: Store, server: Server, size: Size) -> None:
    """Saturation, then windows of people in turns: alone, beside batch requests."""
    _warm(server, size)
    saturation = store.get("saturation", partial(saturate, server, size))
    gaps_s = _gaps_s(saturation["requests_per_s"], size.arrivals)
    for number in range(size.repeats):
        for name in ("alone", "beside") if number % 2 == 0 else ("beside", "alone"):
            run = partial(window, server, size, gaps_s, number, name == "beside")
            store.get(f"{name}-{number}", run)


def _warm(server: Server, size: Size) -> None:
    """Memory that nothing has touched yet costs the first window alone."""
    window(server, size, [0.0] * 2, -1, False)


def _gaps_s(saturation: float, count: int) -> list[float]:
    """Seconds before each arrival, exponentially spread, of people who take their share."""
    rng = random.Random(71)
    raw = [rng.expovariate(1.0) for _ in range(count)]
    return [each * count / sum(raw) / (PEOPLE * saturation) for each in raw]


# ------------------------------------------------------------------ what is run


def body(prompt: str, batch: bool, tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
    """One request of the API."""
    fixed: dict[str, Any] = {"model": "smollm2", "temperature": 0, "ignore_eos": True}
    tier = {"service_tier": "flex"} if batch else {}
    return {**fixed, **tier, "prompt": prompt, "max_tokens": tokens, "return_token_ids": True}


@asynccontextmanager
async def background(
    client: load.Client, size: Size, on: bool = True
) -> AsyncIterator[list[load.Answer]]:
    """Batch requests of prompts that nobody shares, `CLIENTS` at a time while the block lasts; the
    list grows by those that are answered."""
    done: list[load.Answer] = []
    rng = random.Random(time.time_ns())

    async def one() -> None:
        while True:
            done.append(await client.ask(PATH, body(words(rng, size.prompt_tokens), True)))

    tasks = [asyncio.create_task(one()) for _ in range(CLIENTS if on else 0)]
    try:
        yield done
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [each for each in ended if not isinstance(each, asyncio.CancelledError)]
    if failed:
        raise RuntimeError(f"a batch client ended: {failed[0]!r}")


def saturate(server: Server, size: Size) -> dict[str, Any]:
    """Requests a second of batch requests alone."""

    async def run() -> dict[str, Any]:
        async with load.client(server.url) as client, background(client, size) as done:
            # Until as many are in flight as there will be.
            await asyncio.sleep(size.saturated_s / 4)
            began_s = time.perf_counter()
            await asyncio.sleep(size.saturated_s)
            within = _ended_within(done, began_s, time.perf_counter())
        return {"requests_per_s": within / size.saturated_s}

    return asyncio.run(run())


def window(
    server: Server, size: Size, gaps_s: Sequence[float], number: int, beside: bool
) -> dict[str, Any]:
    """People who arrive after each of `gaps_s`, with batch requests beside them or without."""
    return asyncio.run(_window(server, size, gaps_s, number, beside))


async def _window(
    server: Server, size: Size, gaps_s: Sequence[float], number: int, beside: bool
) -> dict[str, Any]:
    # Of one window alone and of its pair: no prompt comes twice to one cluster.
    rng = random.Random(1000 * number + beside)
    bodies = [body(words(rng, size.prompt_tokens), False) for _ in gaps_s]
    own_s = time.process_time()
    async with load.client(server.url) as client, background(client, size, beside) as done:
        if beside:
            await asyncio.sleep(size.saturated_s / 4)
        began_s = time.perf_counter()
        answers = await load.open_loop(client, PATH, bodies, list(itertools.accumulate(gaps_s)))
        ended_s = time.perf_counter()
        within = _ended_within(done, began_s, ended_s)
    for answer in (*answers, *done):
        answer.check()
    return {
        "wall_s": ended_s - began_s,
        "client_share": (time.process_time() - own_s) / (ended_s - began_s),
        "ttft_s": [round(answer.ttft_s, 4) for answer in answers],
        "gaps_s": [round(gap, 4) for answer in answers for gap in answer.gaps_s],
        "batch_done": within,
        "batch_ttft_s": [round(answer.ttft_s, 4) for answer in done],
    }


def _ended_within(answers: Sequence[load.Answer], began_s: float, ended_s: float) -> int:
    return sum(began_s <= answer.ended_s <= ended_s for answer in answers)


def talk(server: Server, size: Size, beside: bool) -> dict[str, Any]:
    """Conversations in turns, one question at a time; their tokens, and those that were cached."""
    return asyncio.run(_talk(server, size, beside))


async def _talk(server: Server, size: Size, beside: bool) -> dict[str, Any]:
    rng = random.Random(72)
    texts = [words(rng, size.turn_tokens) for _ in range(size.conversations)]
    turns = []
    async with load.client(server.url) as client, background(client, size, beside) as done:
        for turn in range(size.turns):
            for at in range(len(texts)):
                answer = (await client.ask(PATH, body(texts[at], False, 8))).check()
                turns.append((turn, answer.prompt_tokens, answer.cached_tokens))
                texts[at] += " " + words(rng, size.turn_tokens)
        answered = len(done)
    later = [each for each in turns if each[0]]
    cached, total = (sum(each[at] for each in later) for at in (2, 1))
    return {"turns": turns, "share": cached / total, "batch_done": answered}


# ------------------------------------------------------------------ from windows to rows


def rows(kept: Callable[[str], Any], size: Size) -> list[Row]:
    """A row for each target, and others; `kept` has what was measured under a key."""
    alone, beside = (
        [kept(f"{name}-{n}") for n in range(size.repeats)] for name in ("alone", "beside")
    )
    return [
        _ttft(alone, beside),
        _throughput(kept("saturation")["requests_per_s"], beside),
        _hits(kept("talk-alone"), kept("talk-beside")),
        *_shown(alone, beside),
    ]


def _pooled(runs: Sequence[dict[str, Any]], what: str) -> list[float]:
    return [value for run in runs for value in run[what]]


def _ttft(alone: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]]) -> Row:
    p95_s = [quantile(_pooled(runs, "ttft_s"), 0.95) for runs in (alone, beside)]
    ratios = [
        quantile(b["ttft_s"], 0.95) / quantile(a["ttft_s"], 0.95)
        for a, b in zip(alone, beside, strict=True)
    ]
    detail = (
        f"{p95_s[1]:.2f} s with, {p95_s[0]:.2f} s without, of {len(_pooled(alone, 'ttft_s'))} "
        f"each; by window {spread(ratios)}"
    )
    name = f"p95 TTFT of people with batch requests beside, chunk {CHUNK_TOKENS}"
    return at_most(name, p95_s[1] / p95_s[0], "x", 1.25, detail)


def _throughput(saturation: float, beside: Sequence[dict[str, Any]]) -> Row:
    seconds = sum(run["wall_s"] for run in beside)
    batch = sum(run["batch_done"] for run in beside) / seconds
    people = len(_pooled(beside, "ttft_s")) / seconds
    detail = (
        f"{60 * batch:.1f} batch requests a minute beside {60 * people:.1f} of people; "
        f"saturation {60 * saturation:.1f}"
    )
    name = "batch throughput, of what people leave of saturation"
    return at_least(name, batch / (saturation - people), "x", 0.8, detail)


def _hits(alone: dict[str, Any], beside: dict[str, Any]) -> Row:
    detail = (
        f"{100 * beside['share']:.1f} % of later turns' tokens with, {100 * alone['share']:.1f} % "
        f"without; {beside['batch_done']} batch requests meanwhile"
    )
    name = "cached tokens of people with batch requests beside, of those without"
    return at_least(name, beside["share"] / alone["share"], "x", 0.98, detail)


def _shown(alone: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]]) -> list[Row]:
    found = []
    for name, runs in (("without", alone), ("with", beside)):
        ttft_s, gaps_s = _pooled(runs, "ttft_s"), _pooled(runs, "gaps_s")
        client = max(run["client_share"] for run in runs)
        detail = f"p50 {quantile(ttft_s, 0.5):.2f} s; client {client:.2f} of a core"
        found.append(shown(f"{name}: p95 TTFT of people", quantile(ttft_s, 0.95), "s", detail))
        p99 = f"p99 {1000 * quantile(gaps_s, 0.99):.0f} ms, {len(gaps_s)} gaps"
        found.append(shown(f"{name}: p50 ITL of people", 1000 * quantile(gaps_s, 0.5), "ms", p99))
    waits = _pooled(beside, "batch_ttft_s")
    if waits:
        detail = f"most {max(waits):.1f} s, {len(waits)} requests; their room included"
        found.append(shown("p50 TTFT of batch requests", statistics.median(waits), "s", detail))
    return found
