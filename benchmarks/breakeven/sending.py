"""Sends the requests of a mixed load, and keeps of each what its goodput is told by."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.breakeven.arrivals import Kind, Mix, Piece, Request, schedule, tokens
from benchmarks.breakeven.goodput import Targets
from benchmarks.serve import load as serving

PATH = "/v1/completions"
ANSWER_TOKENS = 24


async def one_by_one(url: str, mix: Mix, count: int) -> dict[str, list[dict[str, Any]]]:
    """Requests of each kind when nothing else runs, of as many tokens as they have in the mean and
    with nothing cached."""
    sent: dict[str, list[dict[str, Any]]] = {kind: [] for kind in Kind}
    mean = mean_tokens(mix)
    async with serving.client(url) as client:
        # The first touches memory that nothing has touched yet.
        for number in range(count + 1):
            for kind in Kind:
                request = Request(0.0, kind, (Piece(number, mean[kind]),))
                answer = await client.ask(PATH, _body(request, f"{kind} {time.time_ns()}"))
                if number:
                    sent[kind].append(_told(request, answer))
    return sent


def mean_tokens(mix: Mix) -> dict[Kind, int]:
    """Of a prompt by kind, in a window that is long enough to tell."""
    requests = schedule(mix, 1.0, 2000.0, 1)
    of_kind = {kind: [r.prompt_tokens for r in requests if r.kind is kind] for kind in Kind}
    return {kind: round(statistics.fmean(each)) for kind, each in of_kind.items()}


async def arrive(
    url: str, requests: Sequence[Request], seconds: float, wanted: Targets
) -> dict[str, Any]:
    """An open loop. What is not answered when its target would be missed anyway is given up, at
    the window's end."""
    # Never the same text twice on one cluster, also when a run goes on where it stopped.
    text = str(time.time_ns())
    bodies = [_body(request, text) for request in requests]
    async with serving.client(url) as client:
        loop = asyncio.get_running_loop()
        began_s, own_s = loop.time(), time.process_time()

        async def one(request: Request, body: dict[str, Any]) -> serving.Answer | None:
            await asyncio.sleep(max(0.0, began_s + request.at_s - loop.time()))
            patience_s = wanted.ttft_s[request.kind] + ANSWER_TOKENS * wanted.gap_s
            try:
                async with asyncio.timeout_at(began_s + max(seconds, request.at_s + patience_s)):
                    return await client.ask(PATH, body)
            except TimeoutError:
                return None

        answers = await asyncio.gather(*map(one, requests, bodies))
        wall_s = loop.time() - began_s
        share = (time.process_time() - own_s) / wall_s
    sent = list(map(_told, requests, answers))
    return {"seconds": seconds, "wall_s": wall_s, "client_share": share, "sent": sent}


def _body(request: Request, text: str) -> dict[str, Any]:
    # With token ids, tokens without text are timed too.
    fixed: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    prompt = tokens(request.pieces, text)
    return {"model": "smollm2", **fixed, "prompt": prompt, "max_tokens": ANSWER_TOKENS}


def _told(request: Request, answer: serving.Answer | None) -> dict[str, Any]:
    """What is kept of a request; without an answer there are no times."""
    told: dict[str, Any] = {"kind": request.kind, "at_s": round(request.at_s, 3)}
    if answer is None:
        return {**told, "ttft_s": None, "gap_s": None}
    answer.check()
    return {
        **told,
        "ttft_s": round(answer.ttft_s, 4),
        "gap_s": round(sum(answer.gaps_s) / (answer.generated_tokens - 1), 5),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "plan": answer.plan.split(";")[0],
    }
