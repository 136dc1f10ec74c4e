"""`breakeven batch`: a file of requests through a running cluster, as work that nobody waits for.

Each request is sent as OpenAI's service tier `flex`, which gives way to people (decision 20), and
its answer is written at once. A run that ended in any way is gone on with by the same command.
"""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx

from cluster import batch_file, state, tls
from cluster.batch_file import Answer, Answers, Call, Response
from cluster.batch_progress import Progress
from cluster.config import api_key
from cluster.errors import BatchFileError, NotRunningError, RefusedError, TlsError
from cluster.status import address

# Room at the ingress is little and passes; so is a cluster that restarts replicas. Without any
# answer for so long the cluster is given up.
PATIENCE_S = 300.0
_AGAIN_S, _MOST_AGAIN_S = 1.0, 30.0
# Of one request that the cluster fails to answer while it answers others.
_TRIES = 3
_CONNECT_S = 10.0
_BUSY = (429, 503)
STOPPED = 130


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command was told."""

    requests: Path
    answers: Path
    concurrency: int
    url: str | None = None
    as_json: bool = False


def batch(asked: Asked) -> int:
    """Send what has no answer yet; 0 once all have a good one, 1 where some were refused or are
    left, 130 when interrupted. Raises `BatchFileError` for files that are not a batch's, before
    anything is sent, and `NotRunningError`, `TlsError` or `RefusedError` where no cluster takes
    it."""
    names = batch_file.check(asked.requests)
    if asked.answers.exists() and asked.answers.samefile(asked.requests):
        raise BatchFileError(str(asked.answers), 0, "holds the requests; give another file")
    with batch_file.answers(asked.answers) as answers:
        strange = next((name for name in answers.known if name not in names), None)
        if strange is not None:
            complaint = f"answers {strange!r}, which {asked.requests} does not ask"
            raise BatchFileError(str(asked.answers), 0, f"{complaint}; give another file")
        stopped = _run(asked, answers, len(names))
        return _end(asked, answers, len(names), stopped)


def _run(asked: Asked, answers: Answers, total: int) -> bool:
    """Whether it was interrupted."""
    if len(answers.known) == total:
        return False
    calls = batch_file.calls(asked.requests)
    left = (call for call in calls if call.custom_id not in answers.known)
    try:
        with Progress(total, answers.known) as progress:
            asyncio.run(_Sending(asked, answers, progress).all(left))
    except KeyboardInterrupt:
        return True
    return False


def _end(asked: Asked, answers: Answers, total: int, stopped: bool) -> int:
    well, refused = batch_file.counted(answers.known)
    left = total - well - refused
    if asked.as_json:
        print(json.dumps({"total": total, "answered": well, "refused": refused, "left": left}))
    else:
        again = "; the same command goes on with those" if left else ""
        print(f"{well} of {total} answered, {refused} refused, {left} left{again}")
    if stopped:
        return STOPPED
    return 0 if well == total else 1


class _Sending:
    """One run over what is left. Requests begin in the order of their file."""

    def __init__(self, asked: Asked, answers: Answers, progress: Progress) -> None:
        self._asked, self._answers, self._progress = asked, answers, progress
        self._url = (asked.url or address()).rstrip("/")
        self._heard_s = time.monotonic()

    async def all(self, left: Iterator[Call]) -> None:
        """Each one's answer is in the file once this returns, but for those that got none."""
        async with self._client() as client:
            await self._check(client)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(self._asked.concurrency):
                        tasks.create_task(self._work(client, left))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        key = api_key()
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        # An answer may take as long as the cluster lets others go first.
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=self._asked.concurrency)
        # Of a machine that is gone nothing is heard, unless it is asked for.
        alive = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        way = httpx.AsyncHTTPTransport(verify=_trust(), limits=limits, socket_options=alive)
        async with httpx.AsyncClient(headers=headers, timeout=timeout, transport=way) as client:
            yield client

    async def _check(self, client: httpx.AsyncClient) -> None:
        """Whether anybody is there and takes it: without a key each request would be refused."""
        try:
            answer = await client.get(f"{self._url}/v1/models", timeout=_CONNECT_S)
        except httpx.TransportError as error:
            if isinstance(failed := _cause(error), ssl.SSLError):
                raise TlsError(self._url, tls.reason(failed)) from error
            raise NotRunningError(self._url) from error
        if answer.status_code == 401:
            raise RefusedError(self._url, "wants an API key; set BREAKEVEN_API_KEY")
        self._heard_s = time.monotonic()

    async def _work(self, client: httpx.AsyncClient, left: Iterator[Call]) -> None:
        for call in left:
            self._progress.begin()
            answer = await self._answer(client, call)
            if answer is not None:
                self._answers.add(answer)
            self._progress.end(None if answer is None else answer.response.status_code)

    async def _answer(self, client: httpx.AsyncClient, call: Call) -> Answer | None:
        """The last word on a request; None where there is none yet. Raises `NotRunningError` once
        nobody has answered anything for long."""
        failures = 0
        for number in count():
            response = await self._post(client, call)
            if response is not None and response.status_code < 500 and response.status_code != 429:
                self._heard_s = time.monotonic()
                return _told(call, response)
            if response is not None and response.status_code not in _BUSY:
                self._heard_s = time.monotonic()
                failures += 1
            if failures == _TRIES:
                return None
            if time.monotonic() - self._heard_s > PATIENCE_S:
                raise NotRunningError(self._url)
            await asyncio.sleep(_again_s(response, number))
        raise AssertionError("unreachable")

    async def _post(self, client: httpx.AsyncClient, call: Call) -> httpx.Response | None:
        """None where the connection failed."""
        try:
            body = {**call.body, "service_tier": "flex"}
            return await client.post(self._url + call.url, json=body)
        except httpx.TransportError:
            return None


def _told(call: Call, response: httpx.Response) -> Answer:
    try:
        body = response.json()
    except ValueError:
        body = response.text
    request_id = response.headers.get("x-request-id", "")
    told = Response(response.status_code, request_id, body)
    return Answer(id=f"batch_req_{request_id}", custom_id=call.custom_id, response=told)


def _again_s(response: httpx.Response | None, number: int) -> float:
    """As the cluster says, or twice as long as the last time."""
    usual_s: float = min(_MOST_AGAIN_S, _AGAIN_S * 2 ** min(number, 10))
    said = "" if response is None else response.headers.get("retry-after", "")
    return min(_MOST_AGAIN_S, float(said)) if said.isascii() and said.isdigit() else usual_s


def _cause(error: BaseException) -> BaseException:
    """What lies behind a client's own error."""
    while (behind := error.__cause__ or error.__context__) is not None:
        error = behind
    return error


def _trust() -> ssl.SSLContext | bool:
    found = state.read()
    return tls.trust(found.certificate if found is not None else None) or True
