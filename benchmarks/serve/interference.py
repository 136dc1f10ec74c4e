"""What long prompts do to running streams: pools apart against two engines that do both.

Streams run while unique prompts of 2,000 tokens arrive, at seeded times, so often that one prefill
engine is 70 % busy. Ours has one prefill and one decode engine; the baseline has two that do both,
behind least-loaded routing, at each chunk size. Same two cores, same arrivals.
"""

import asyncio
import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.result import Row, Store, at_most, quantile, shown, spread
from benchmarks.serve import clusters, load
from benchmarks.serve.clusters import Server
from benchmarks.serve.texts import words

PORT_OURS, PORT_BASE = 18142, 18143
PATH = "/v1/completions"
# As many as one engine of the default configuration runs at once.
STREAMS = 16
BUSY = 0.7
PROMPT_TOKENS = 2000
_PROMPT_ANSWER_TOKENS = 8
_STREAM_PROMPT_TOKENS = 64
# More than any window lasts; the client leaves before.
_STREAM_ANSWER_TOKENS = 7000
# Streams at their longest and two prompts in flight, on one engine: 2 GiB are 46,000 tokens.
_ENGINE = {"kv_cache_memory_bytes": 2 << 30, "max_num_seqs": 32}


@dataclass(frozen=True, slots=True)
class Size:
    """Chunk sizes of the baseline; arrivals in the search among them, and in each repeat."""

    chunks: tuple[int, ...]
    search: int
    arrivals: int
    repeats: int


FULL = Size(chunks=(128, 256, 512, 2048), search=5, arrivals=8, repeats=3)
QUICK = Size(chunks=(512,), search=1, arrivals=1, repeats=1)


def measure(quick: bool) -> list[Row]:
    """Rows of this part; what was measured of this commit is not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    best = _search(store, size) if len(size.chunks) > 1 else size.chunks[0]
    _repeat(store, size, best, quick)
    return _rows(store, size, best)


def _ours(quick: bool = False) -> contextlib.AbstractContextManager[Server]:
    sections = {"engine": _ENGINE, "prefill": {"replicas": 1}, "decode": {"replicas": 1}}
    return clusters.ours("1 prefill, 1 decode", PORT_OURS, sections, quick)


def _base(chunk: int, quick: bool = False) -> contextlib.AbstractContextManager[Server]:
    sections: dict[str, Any] = {
        "engine": _ENGINE,
        "prefill": {"replicas": 0},
        "decode": {"replicas": 2, "engine": {"max_num_batched_tokens": chunk}},
        "router": {"policy": "least_loaded"},
    }
    return clusters.ours(f"2 colocated, chunk {chunk}", PORT_BASE, sections, quick)


def _search(store: Store, size: Size) -> int:
    """The baseline's chunk size with the lowest p99 between tokens, by a shorter window each."""
    if "prefill_s" not in store:
        with _ours() as ours:
            store.get("prefill_s", partial(calibrate, ours))
    gaps_s = _arrival_gaps_s(store.kept("prefill_s"), size.arrivals)[: size.search]
    for chunk in size.chunks:
        if f"search-{chunk}" not in store:
            with _base(chunk) as base:
                store.get(f"search-{chunk}", partial(window, base, gaps_s))
    p99_s = {chunk: _p(store.kept(f"search-{chunk}"), 0.99) for chunk in size.chunks}
    return min(size.chunks, key=lambda chunk: p99_s[chunk])


def _repeat(store: Store, size: Size, best: int, quick: bool) -> None:
    """Ours and the best baseline in turns, each time on a cluster that was started for it and has
    the machine to itself. One that stood still while the other ran would be measured while its
    memory comes back and its replicas meet anew."""
    starts = {"ours": partial(_ours, quick), "base": partial(_base, best, quick)}
    for number in range(size.repeats):
        for name in ("ours", "base") if number % 2 == 0 else ("base", "ours"):
            key = f"{name}-{number}"
            if key in store:
                continue
            with starts[name]() as server:
                if "prefill_s" not in store:
                    store.get("prefill_s", partial(calibrate, server))
                gaps_s = _arrival_gaps_s(store.kept("prefill_s"), size.arrivals)
                # Pages of memory that nothing has touched yet cost the first window alone.
                calibrate(server, 1)
                store.get(key, partial(window, server, gaps_s))


# ------------------------------------------------------------------ one window


def calibrate(server: Server, count: int = 3) -> float:
    """Seconds that one such prompt takes the prefill engine while the streams run."""
    done = window(server, [0.0] * count, one_by_one=True)
    return float(statistics.median(done["prompts"]["ttft_s"]))


def _arrival_gaps_s(prefill_s: float, count: int) -> list[float]:
    """Seconds before each arrival; their mean keeps one prefill engine busy for `BUSY`."""
    rng = random.Random(70)
    raw = [rng.uniform(0.5, 1.5) for _ in range(count)]
    return [prefill_s / BUSY * each * count / sum(raw) for each in raw]


_windows = itertools.count()


def window(server: Server, gaps_s: Sequence[float], one_by_one: bool = False) -> dict[str, Any]:
    """Streams, and prompts that arrive after each of `gaps_s`."""
    return asyncio.run(_window(server, gaps_s, one_by_one))


async def _window(server: Server, gaps_s: Sequence[float], one_by_one: bool) -> dict[str, Any]:
    # No two windows share a prompt: a cache would answer for the engines.
    rng = random.Random(time.time_ns() + next(_windows))
    prompts = [_body(words(rng, PROMPT_TOKENS), _PROMPT_ANSWER_TOKENS) for _ in gaps_s]
    starts = [
        _body(words(rng, _STREAM_PROMPT_TOKENS), _STREAM_ANSWER_TOKENS) for _ in range(STREAMS)
    ]
    processes = server.processes()
    async with load.client(server.url) as client:
        over = asyncio.Event()
        streams = [asyncio.create_task(client.ask(PATH, body, over)) for body in starts]
        # All of them are past their own prompts.
        await asyncio.sleep(4.0)
        began_s, cpu_s, own_s = time.perf_counter(), clusters.cpu_s(processes), time.process_time()
        if one_by_one:
            answers = [await client.ask(PATH, body) for body in prompts]
        else:
            answers = await load.open_loop(
                client, PATH, prompts, list(itertools.accumulate(gaps_s))
            )
        ended_s = time.perf_counter()
        wall_s = ended_s - began_s
        cpu_s, own_s = clusters.cpu_s(processes) - cpu_s, time.process_time() - own_s
        over.set()
        ran = await asyncio.gather(*streams)
    for answer in (*answers, *ran):
        answer.check()
    return {
        "wall_s": wall_s,
        "cores": cpu_s / wall_s,
        "client_share": own_s / wall_s,
        "plans": sorted({answer.plan.split(";")[0] for answer in answers}),
        "gaps_s": [[round(g, 4) for g in _gaps_within(a, began_s, ended_s)] for a in ran],
        "streams_ttft_s": [round(a.ttft_s, 4) for a in ran],
        "prompts": {
            "ttft_s": [round(a.ttft_s, 4) for a in answers],
            "tokens": answers[0].prompt_tokens,
        },
    }


def _gaps_within(answer: load.Answer, began_s: float, ended_s: float) -> list[float]:
    """Gaps that end while prompts are being served."""
    times = answer.token_times_s
    pairs = itertools.pairwise(times)
    return [later - earlier for earlier, later in pairs if began_s <= later <= ended_s]


def _body(prompt: str, tokens: int) -> dict[str, Any]:
    fixed: dict[str, Any] = {"model": "smollm2", "temperature": 0, "ignore_eos": True}
    # Tokens without text are tokens: of a stream's last thousands many are, and a gap over
    # them would pass for a stall.
    fixed["return_token_ids"] = True
    return {**fixed, "prompt": prompt, "max_tokens": tokens}


# ------------------------------------------------------------------ from windows to rows


def _all_gaps(done: dict[str, Any]) -> list[float]:
    return [gap for stream in done["gaps_s"] for gap in stream]


def _p(done: dict[str, Any], q: float) -> float:
    return quantile(_all_gaps(done), q)


def waited(gaps_s: Sequence[float], q: float) -> float:
    """The gap in which a stream stands at a moment taken at random, as a quantile: each gap
    counts by its length, so that a stall of seconds weighs what its reader waits."""
    ordered, passed_s, total_s = sorted(gaps_s), 0.0, sum(gaps_s)
    for gap in ordered:
        passed_s += gap
        if passed_s >= q * total_s:
            return gap
    return float("nan")


def _rows(store: Store, size: Size, best: int) -> list[Row]:
    ours = [store.kept(f"ours-{n}") for n in range(size.repeats)]
    base = [store.kept(f"base-{n}") for n in range(size.repeats)]
    ratios = [_p(a, 0.99) / _p(b, 0.99) for a, b in zip(ours, base, strict=True)]
    prefill_s = store.kept("prefill_s")
    name = f"p99 ITL of {STREAMS} streams under 2k prompts, against 2 colocated at their best chunk"
    detail = (
        f"{spread(ratios)}; ours {_ms(ours, 0.99)}, chunk {best} {_ms(base, 0.99)}; "
        f"a prompt takes {prefill_s:.2f} s, one every {prefill_s / BUSY:.1f} s; "
        f"our plans: {', '.join(ours[0]['plans'])}"
    )
    return [
        at_most(name, statistics.median(ratios), "x", 0.5, detail),
        *_weighed(ours, base),
        *[
            row
            for who, runs in (("ours", ours), (f"chunk {best}", base))
            for row in _each(who, runs)
        ],
        *[_searched(store, chunk) for chunk in size.chunks if f"search-{chunk}" in store],
    ]


def _weighed(ours: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for q in (0.5, 0.99):
        pairs = [[waited(_all_gaps(done), q) for done in runs] for runs in (ours, base)]
        ratios = [a / b for a, b in zip(*pairs, strict=True)]
        detail = (
            f"{spread(ratios)}; ours {1000 * statistics.median(pairs[0]):.0f}, "
            f"colocated {1000 * statistics.median(pairs[1]):.0f} ms"
        )
        name = f"p{100 * q:g} of the gap at a random moment, against the same"
        rows.append(shown(name, statistics.median(ratios), "x", detail))
    return rows


def _each(who: str, runs: list[dict[str, Any]]) -> list[Row]:
    prompts = [t for run in runs for t in run["prompts"]["ttft_s"]]
    streams = [t for run in runs for t in run["streams_ttft_s"]]
    cores = statistics.median(run["cores"] for run in runs)
    client = max(run["client_share"] for run in runs)
    tails = f"p99.9 {_ms(runs, 0.999)}, most {_ms(runs, 1.0)}"
    n = sum(len(_all_gaps(run)) for run in runs)
    return [
        shown(f"{who}: p50 ITL of streams", _median_ms(runs, 0.5), "ms", f"{n} gaps"),
        shown(f"{who}: p99 ITL of streams", _median_ms(runs, 0.99), "ms", tails),
        shown(
            f"{who}: p50 TTFT of prompts",
            quantile(prompts, 0.5),
            "s",
            f"p99 {quantile(prompts, 0.99):.2f} s, {len(prompts)} prompts",
        ),
        shown(
            f"{who}: p50 TTFT of streams",
            quantile(streams, 0.5),
            "s",
            f"p99 {quantile(streams, 0.99):.2f} s; {cores:.2f} cores, client {client:.2f} at most",
        ),
    ]


def _searched(store: Store, chunk: int) -> Row:
    done = store.kept(f"search-{chunk}")
    detail = (
        f"p50 {1000 * _p(done, 0.5):.0f}, p99.9 {1000 * _p(done, 0.999):.0f} ms; "
        f"at a random moment p50 {1000 * waited(_all_gaps(done), 0.5):.0f}, "
        f"p99 {1000 * waited(_all_gaps(done), 0.99):.0f} ms; "
        f"TTFT of prompts p50 {quantile(done['prompts']['ttft_s'], 0.5):.2f} s"
    )
    return shown(
        f"colocated, chunk {chunk}: p99 ITL in the search", 1000 * _p(done, 0.99), "ms", detail
    )


def _median_ms(runs: list[dict[str, Any]], q: float) -> float:
    return 1000 * statistics.median(_p(run, q) for run in runs)


def _ms(runs: list[dict[str, Any]], q: float) -> str:
    return f"{_median_ms(runs, q):.0f} ms"
