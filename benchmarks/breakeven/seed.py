"""What any cache hit can save, and what one saves: the experiments that this project began with.

(a) Of a lone request's time, the part before its first token, by input and output tokens: no hit
saves more than that. A request that makes most tokens tells of those that make fewer by when their
last one came. (b) A long prompt of which a growing part is in the cache, several at once: hit
ratio, throughput, time of a request. Both on one decode engine behind the ingress. (c) Computing,
a device hit and restores from each tier against length are parts of `make bench-tiers` (`restore`,
`vault_restore`): what those have recorded is drawn beside, and not measured again.
"""

import asyncio
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.breakeven.arrivals import IDS
from benchmarks.breakeven.seed_rows import rows
from benchmarks.result import Row, Store
from benchmarks.serve import clusters, load
from benchmarks.serve.clusters import Server

PORT = 18_701
PATH = "/v1/completions"
BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Size:
    """(a) inputs, outputs and repeats; (b) the prompt, which shares of it are common, how many
    run at once, and for how many requests each of these asks."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    repeats: int
    prompt_tokens: int
    shares: tuple[float, ...]
    concurrencies: tuple[int, ...]
    waves: int


FULL = Size(
    (256, 512, 1024, 2048, 4096), (16, 64, 256), 3, 2048, (0.0, 0.25, 0.5, 0.75, 1.0), (1, 4, 8), 2
)
QUICK = Size((64, 256), (4, 16), 1, 256, (0.0, 1.0), (1, 2), 1)
# Of a request of (b).
ANSWER_TOKENS = 16


def measure(quick: bool) -> list[Row]:
    """Rows of this part; cells that were measured at this commit are not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    cells = _cells(size)
    if any(key not in store for key in cells):
        sections = {"prefill": {"replicas": 0}, "decode": {"replicas": 1}}
        with clusters.ours("1 engine", PORT, sections, quick) as server:
            # Memory that nothing has touched yet costs the first request alone.
            _alone(server, size, size.inputs[0])
            for number, (key, run) in enumerate(cells.items(), start=1):
                store.get(key, partial(run, server))
                print(f"    {number} of {len(cells)}: {key}", flush=True)
    return rows({key: store.kept(key) for key in cells})


def _cells(size: Size) -> dict[str, Any]:
    """What is run, by its key: lone requests, then shares of a common prefix. Repeats come last to
    first, so that what drifts does not look like a trend."""
    alone = {
        f"alone/{tokens}/{number}": partial(_alone, size=size, tokens=tokens)
        for number in range(size.repeats)
        for tokens in size.inputs[:: 1 if number % 2 == 0 else -1]
    }
    common = {
        f"common/{share:g}/{at_once}": partial(_common, size=size, share=share, at_once=at_once)
        for at_once in size.concurrencies
        for share in size.shares
    }
    return alone | common


# ------------------------------------------------------------------ what is run


def _alone(server: Server, size: Size, tokens: int) -> dict[str, Any]:
    """A prompt that no cache knows, and when each token of its answer came."""

    async def run() -> load.Answer:
        async with load.client(server.url) as client:
            return await client.ask(PATH, _body(_ids(_fresh(), tokens), size.outputs[-1]))

    answer = asyncio.run(run()).check()
    if answer.prompt_tokens != tokens or answer.cached_tokens:
        raise RuntimeError(f"{answer.cached_tokens} of {answer.prompt_tokens} tokens were cached")
    at_s = [round(at - answer.sent_s, 4) for at in token_times_s(answer)]
    latency_s = {count: at_s[count - 1] for count in size.outputs}
    return {"tokens": tokens, "ttft_s": at_s[0], "latency_s": latency_s}


def token_times_s(answer: load.Answer) -> list[float]:
    """When each token came: several of one event came at once."""
    return [
        at_s
        for at_s, event in answer.events
        for choice in event.get("choices", ())
        for _ in choice.get("token_ids") or ()
    ]


def _common(server: Server, size: Size, share: float, at_once: int) -> dict[str, Any]:
    """Requests, `at_once` at a time, of which this share of the prompt is one that was asked for
    before."""
    rng = _fresh()
    shared = _ids(rng, int(size.prompt_tokens * share) // BLOCK_TOKENS * BLOCK_TOKENS)
    rest = size.prompt_tokens - len(shared)
    bodies = [_body(shared + _ids(rng, rest), ANSWER_TOKENS) for _ in range(size.waves * at_once)]

    async def run() -> load.Load:
        async with load.client(server.url) as client:
            if shared:
                (await client.ask(PATH, _body(shared, 1))).check()
            return await load.closed_loop(client, PATH, bodies, at_once)

    done = asyncio.run(run())
    return {
        "share": share,
        "at_once": at_once,
        "wall_s": done.wall_s,
        "client_share": done.client_share,
        "prompt_tokens": sum(answer.prompt_tokens for answer in done.answers),
        "cached_tokens": sum(answer.cached_tokens for answer in done.answers),
        "latency_s": [round(answer.ended_s - answer.sent_s, 4) for answer in done.answers],
        "ttft_s": [round(answer.ttft_s, 4) for answer in done.answers],
    }


def _fresh() -> random.Random:
    """Never the same text twice on one cluster, also when a run goes on where it stopped."""
    return random.Random(time.time_ns())


def _ids(rng: random.Random, count: int) -> list[int]:
    return rng.choices(IDS, k=count)


def _body(prompt: list[int], tokens: int) -> dict[str, Any]:
    # With token ids, tokens without text are timed too.
    fixed: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": "smollm2", **fixed, "prompt": prompt, "max_tokens": tokens}
