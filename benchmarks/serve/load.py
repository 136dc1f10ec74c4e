"""A load generator for the OpenAI API: asyncio, streams, every arrival timed.

While a load runs, an arrival costs one clock reading and one append; the events are parsed when
it has ended, so that the client, which has its cores in common with the servers, takes little of
them. `Load.client_share` says how much.
"""

import asyncio
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass(slots=True)
class Arrival:
    """Bytes of a response, and when they came (seconds of `time.perf_counter`)."""

    at_s: float
    content: bytes


@dataclass
class Answer:
    """One streamed response. Times are seconds of `time.perf_counter`.

    Parsed when first asked, so after the load.
    """

    sent_s: float
    status: int = 0
    plan: str = ""
    arrivals: list[Arrival] = field(default_factory=list)
    ended_s: float = 0.0

    @cached_property
    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """Server-sent events and when the last byte of each came."""
        events, rest = [], b""
        for arrival in self.arrivals:
            *whole, rest = (rest + arrival.content).split(b"\n\n")
            for event in whole:
                data = event.removeprefix(b"data: ").strip()
                if data and data != b"[DONE]":
                    events.append((arrival.at_s, json.loads(data)))
        return events

    @cached_property
    def token_times_s(self) -> list[float]:
        """When each event with a piece of the answer came."""
        return [at_s for at_s, event in self.events if any(map(_says, event.get("choices", ())))]

    @property
    def ttft_s(self) -> float:
        """Until the first piece; NaN if none came."""
        times = self.token_times_s
        return times[0] - self.sent_s if times else float("nan")

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece and the next."""
        times = self.token_times_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @cached_property
    def usage(self) -> dict[str, Any]:
        found = [event["usage"] for _, event in self.events if event.get("usage")]
        return found[-1] if found else {}

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage.get("prompt_tokens", 0))

    @property
    def generated_tokens(self) -> int:
        return int(self.usage.get("completion_tokens", 0))

    @property
    def cached_tokens(self) -> int:
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    @property
    def text(self) -> str:
        choices = (choice for _, event in self.events for choice in event.get("choices", ()))
        return "".join(map(_piece, choices))

    @property
    def token_ids(self) -> list[int]:
        """Generated tokens, where the request had `return_token_ids`."""
        choices = (choice for _, event in self.events for choice in event.get("choices", ()))
        return [token for choice in choices for token in choice.get("token_ids") or ()]

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt as the server tokenized it, where the request had `return_token_ids`."""
        for _, event in self.events:
            if event.get("prompt_token_ids"):
                return list(event["prompt_token_ids"])
            for choice in event.get("choices", ()):
                if choice.get("prompt_token_ids"):
                    return list(choice["prompt_token_ids"])
        return []

    def check(self) -> "Answer":
        """Itself; raises when the server refused or ended it with an error."""
        failed = self.status != 200 or any("error" in event for _, event in self.events)
        if failed or not self.token_times_s:
            said = b"".join(arrival.content for arrival in self.arrivals)[-300:]
            raise RuntimeError(f"HTTP {self.status}: {said!r}")
        return self


def _piece(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def _says(choice: dict[str, Any]) -> bool:
    """A piece of the answer; a chat's opening event has a role and none of it."""
    return bool(_piece(choice)) or bool(choice.get("token_ids"))


class Client:
    """Sends to one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url

    async def ask(
        self, path: str, body: dict[str, Any], until: asyncio.Event | None = None
    ) -> Answer:
        """One streamed request; when `until` is set the client leaves."""
        body = {"stream": True, "stream_options": {"include_usage": True}, **body}
        answer = Answer(time.perf_counter())
        async with self._session.post(self._url + path, json=body) as response:
            answer.status = response.status
            answer.plan = response.headers.get("x-breakeven-plan", "")
            async for content in response.content.iter_any():
                answer.arrivals.append(Arrival(time.perf_counter(), content))
                if until is not None and until.is_set():
                    break
        answer.ended_s = time.perf_counter()
        return answer


@contextmanager
def undelayed() -> Iterator[None]:
    """The calling thread runs as soon as it has something to do, where that is permitted.

    A load generator that waits for a core sees late what came in time, and would call a server
    slow. On 2 busy cores Linux kept one from running for up to 4.5 s (6.18, autogroups: servers
    and client are sessions of their own), while the servers' tokens went on.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Client]:
    """A client that keeps its connections, as many as it needs."""
    # Below the servers' 5 s: a request never goes out on a connection that is being closed.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session:
        with undelayed():
            yield Client(session, url)


@dataclass
class Load:
    """What a load brought, and what the client took of one core for it."""

    answers: list[Answer]
    wall_s: float
    client_share: float

    @property
    def generated_tokens(self) -> int:
        return sum(answer.generated_tokens for answer in self.answers)


async def timed(work: Callable[[], Awaitable[list[Answer]]]) -> Load:
    """Run a load; its answers are checked when it has ended."""
    cpu_s, began_s = time.process_time(), time.perf_counter()
    answers = await work()
    wall_s = time.perf_counter() - began_s
    share = (time.process_time() - cpu_s) / wall_s
    return Load([answer.check() for answer in answers], wall_s, share)


async def closed_loop(
    asking: Client, path: str, bodies: Sequence[dict[str, Any]], concurrency: int
) -> Load:
    """All bodies, `concurrency` at a time."""

    async def work() -> list[Answer]:
        left = iter(bodies)

        async def worker() -> list[Answer]:
            return [await asking.ask(path, body) for body in left]

        parts = await asyncio.gather(*(worker() for _ in range(concurrency)))
        return [answer for part in parts for answer in part]

    return await timed(work)


async def open_loop(
    asking: Client, path: str, bodies: Sequence[dict[str, Any]], at_s: Sequence[float]
) -> list[Answer]:
    """Each body at its time after the call, whether the ones before it are answered or not."""
    began_s = time.perf_counter()

    async def one(body: dict[str, Any], due_s: float) -> Answer:
        await asyncio.sleep(max(0.0, began_s + due_s - time.perf_counter()))
        return await asking.ask(path, body)

    return list(await asyncio.gather(*map(one, bodies, at_s)))
