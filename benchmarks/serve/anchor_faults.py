"""What a system does when its only prefill replica is killed, as its clients see it.

Clients keep asking, one request each at a time. After `LEAD_S` every process of the prefill
replica gets SIGKILL; the clients start new requests for `AFTER_S` more. Then one client goes on
alone until an answer comes, or until `GIVE_UP_S`.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from anchor_load import Prompts, Sent, ask, client, median
from anchor_systems import MODEL, System

LEAD_S = 6.0
AFTER_S = 30.0
GIVE_UP_S = 150.0
CLIENTS = 3
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 16


@dataclass(slots=True)
class Kill:
    """When it happened and what followed, in seconds of the monotonic clock."""

    at_s: float = 0.0
    killed: set[int] = field(default_factory=set)
    back_s: float | None = None


async def kill_prefill(system: System, seed: int) -> dict[str, Any]:
    """Run the experiment; figures are in seconds after the kill."""
    prompts, done, kill = Prompts(seed), list[Sent](), Kill()
    stop_at = time.monotonic() + LEAD_S + AFTER_S
    async with client(CLIENTS) as http:
        clients = [_keep_asking(system, http, prompts, done, stop_at) for _ in range(CLIENTS)]
        await asyncio.gather(_kill(system, kill), _watch(system, kill), *clients)
        while not _answered_by(done, kill) and time.monotonic() - kill.at_s < GIVE_UP_S:
            done.append(await _one(system, http, prompts))
            await asyncio.sleep(0.5)
    return report(done, kill)


async def _keep_asking(
    system: System, http: httpx.AsyncClient, prompts: Prompts, done: list[Sent], stop_at: float
) -> None:
    # Not in step, so that the kill meets requests at different points.
    await asyncio.sleep(random.Random(len(prompts.next(1))).random())
    while time.monotonic() < stop_at:
        sent = await _one(system, http, prompts)
        done.append(sent)
        if sent.error:
            await asyncio.sleep(0.5)


async def _one(system: System, http: httpx.AsyncClient, prompts: Prompts) -> Sent:
    return await ask(http, system.url, MODEL, prompts.next(PROMPT_TOKENS), OUTPUT_TOKENS)


async def _kill(system: System, kill: Kill) -> None:
    await asyncio.sleep(LEAD_S)
    doomed = system.prefill()
    if not doomed:
        raise SystemExit(f"{system.name}: no process of a prefill replica found")
    kill.killed = {process.pid for process in doomed}
    kill.at_s = time.monotonic()
    for process in doomed:
        process.kill()
    await asyncio.to_thread(psutil.wait_procs, doomed, 5)


async def _watch(system: System, kill: Kill) -> None:
    """Ours says when its prefill replica is routable again; of the other system, whose every
    request needs one, the first answer tells."""
    await asyncio.sleep(LEAD_S + 1)
    if system.name != "ours":
        return
    while time.monotonic() - kill.at_s < GIVE_UP_S:
        if await asyncio.to_thread(system.prefill_is_back, kill.killed):
            kill.back_s = time.monotonic()
            return
        await asyncio.sleep(0.25)


def _answered_by(done: Sequence[Sent], kill: Kill) -> bool:
    return any(not sent.error and sent.start_s > kill.at_s for sent in done)


def report(done: Sequence[Sent], kill: Kill) -> dict[str, Any]:
    """Requests in flight at the kill, those of the 30 s after it, and the way back."""
    at = kill.at_s
    flying = [sent for sent in done if sent.start_s <= at < sent.end_s]
    window = [sent for sent in done if at < sent.start_s <= at + AFTER_S]
    later = [sent for sent in done if sent.start_s > at and not sent.error]
    first = min((sent.end_s - at for sent in later), default=None)
    back = kill.back_s - at if kill.back_s is not None else first
    return {
        "in_flight": _outcomes(flying),
        "new": _outcomes(window),
        "first_new_answer_s": first,
        "prefill_back_s": back,
    }


def _outcomes(sents: Sequence[Sent]) -> dict[str, Any]:
    good = [sent for sent in sents if not sent.error]
    return {
        "requests": len(sents),
        "answered": len(good),
        "timed_out": sum(sent.error.startswith("no end") for sent in sents),
        "errors": sorted({sent.error for sent in sents if sent.error}),
        "median_s": median([sent.end_s - sent.start_s for sent in good]),
        "longest_s": max((sent.end_s - sent.start_s for sent in sents), default=None),
    }
