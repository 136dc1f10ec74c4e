"""The anchor's load: streamed completions of prompts that no cache knows, timed by the client.

Prompts are lists of random token ids, so that their length is exact and no two share a block.
The same code loads both systems, over the same API.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.serve.load import undelayed  # noqa: E402

# Ids that are ordinary text in SmolLM2's vocabulary of 49,152.
IDS = range(1000, 40_000)
CLIENT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of load; tokens of a prompt and of its answer."""

    name: str
    prompt_tokens: int
    output_tokens: int
    requests: int
    concurrency: int


@dataclass(slots=True)
class Sent:
    """One request as its client saw it, in seconds of one monotonic clock.

    `chunks_s` are arrivals of parts that bear a choice; `tokens` is what the server's usage says.
    `error` is empty for an answer of the wanted length.
    """

    start_s: float
    end_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.chunks_s[0] - self.start_s

    @property
    def itl_s(self) -> float:
        """Mean seconds a token after the first, which bundles of tokens in a chunk leave right."""
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.tokens - 1)


class Prompts:
    """Prompts of random ids; a seed gives the same ones to every system."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self, tokens: int) -> list[int]:
        return [self._random.choice(IDS) for _ in range(tokens)]


@asynccontextmanager
async def client(concurrency: int) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=max(64, 2 * concurrency))
    async with httpx.AsyncClient(timeout=CLIENT_TIMEOUT_S, limits=limits) as http:
        with undelayed():
            yield http


async def ask(
    http: httpx.AsyncClient, url: str, model: str, prompt: Sequence[int], tokens: int
) -> Sent:
    """One streamed completion; whatever goes wrong is in `error`, after 60 s at most."""
    sent = Sent(time.monotonic())
    try:
        async with asyncio.timeout(CLIENT_TIMEOUT_S):
            await _stream(http, url, _body(model, prompt, tokens), sent)
    except TimeoutError:
        sent.error = f"no end within {CLIENT_TIMEOUT_S:.0f} s"
    except (httpx.HTTPError, ValueError) as error:
        sent.error = f"{type(error).__name__}: {error}"[:200]
    sent.end_s = time.monotonic()
    if not sent.error and sent.tokens != tokens:
        sent.error = f"{sent.tokens} tokens, {tokens} wanted"
    return sent


def _body(model: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _stream(http: httpx.AsyncClient, url: str, body: dict[str, Any], sent: Sent) -> None:
    async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode(errors="replace")
            sent.error = f"HTTP {answer.status_code}: {text[:160]}"
            return
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                sent.error = f"error in the stream: {str(chunk['error'])[:160]}"
                return
            if chunk.get("choices"):
                sent.chunks_s.append(time.monotonic())
            if chunk.get("usage"):
                sent.tokens = chunk["usage"]["completion_tokens"]


async def closed_loop(url: str, model: str, shape: Shape, prompts: Prompts) -> dict[str, Any]:
    """Run a shape, `concurrency` clients each waiting for its answer, and sum it up."""
    waiting = [prompts.next(shape.prompt_tokens) for _ in range(shape.requests)]
    done: list[Sent] = []

    async def one_client(http: httpx.AsyncClient) -> None:
        while waiting:
            done.append(await ask(http, url, model, waiting.pop(), shape.output_tokens))

    began = time.monotonic()
    async with client(shape.concurrency) as http:
        await asyncio.gather(*(one_client(http) for _ in range(shape.concurrency)))
    return summary(done, time.monotonic() - began)


def summary(done: Sequence[Sent], wall_s: float) -> dict[str, Any]:
    """Figures of one run, in seconds; percentiles are of single requests (or gaps)."""
    good = [sent for sent in done if not sent.error]
    gaps = [b - a for sent in good for a, b in zip(sent.chunks_s, sent.chunks_s[1:], strict=False)]
    return {
        "requests": len(done),
        "errors": sorted({sent.error for sent in done if sent.error}),
        "failed": len(done) - len(good),
        "ttft_p50_s": percentile([sent.ttft_s for sent in good], 50),
        "ttft_p99_s": percentile([sent.ttft_s for sent in good], 99),
        "itl_p50_s": percentile([sent.itl_s for sent in good], 50),
        "gap_p99_s": percentile(gaps, 99),
        "tokens_per_s": sum(sent.tokens for sent in good) / wall_s,
        "wall_s": wall_s,
    }


def percentile(values: Sequence[float], rank: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(rank / 100 * len(ordered) + 0.5) - 1))]


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
