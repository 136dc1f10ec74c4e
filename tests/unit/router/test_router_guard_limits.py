"""The guard holds tenants to their limits, and gives each slot back whatever becomes of it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, StreamingResponse

from router.access import KeyRing, digest
from router.context import bound
from router.guard import Guard
from router.intake import GENERATING, ROUTES
from router.limits import LocalLedger

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0)
CHAT = "/v1/chat/completions"
USES = 50


class Cluster:
    """An app in whose place vLLM's would stand: every request takes a second, or what its body
    says, and uses `USES` tokens."""

    def __init__(self) -> None:
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asked = bound.get()
        assert asked is not None
        body = json.loads((await receive())["body"] or b"{}")
        self.running += 1
        try:
            asked.notes.used_tokens += USES
            if body.get("fails"):
                raise RuntimeError("app")
            await self._answer(body)(scope, receive, send)
        finally:
            self.running -= 1

    def _answer(self, body: dict[str, Any]) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if body.get("stream"):
                await StreamingResponse(_ticks())(scope, receive, send)
                return
            left = asyncio.create_task(_disconnected(receive))
            await asyncio.wait({left}, timeout=1.0)
            left.cancel()
            await JSONResponse({}, body.get("status", 200))(scope, receive, send)

        return answer


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ticks() -> AsyncIterator[bytes]:
    for _ in range(10):
        await asyncio.sleep(0.1)
        yield b"data: x\n\n"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    lines = [f"  - {{sha256: {digest(name)}, tenant: {name}}}" for name in ("two", "rate", "free")]
    path = tmp_path / "keys.yaml"
    path.write_text(
        "keys:\n" + "\n".join(lines) + "\ntenants:\n"
        "  two: {max_requests: 2}\n"
        "  rate: {tokens_per_minute: 60}\n"
    )
    return path


@pytest.fixture
async def guard(keys: Path) -> Guard:
    now = asyncio.get_running_loop().time
    return Guard(Cluster(), 1000, keys=KeyRing(keys, now), ledger=LocalLedger(now))


async def ask(guard: Guard, key: str, path: str = CHAT, **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
    method = next(iter(ROUTES[path]))
    headers = {"x-api-key": key, "x-request-id": "the-same"}
    async with httpx.AsyncClient(transport=transport, base_url="http://guard") as http:
        return await http.request(method, path, content=json.dumps(body), headers=headers)


async def test_the_request_past_the_limit_is_429(guard: Guard) -> None:
    """The third of three at once; the two others are answered, and then a third is too. The ids
    that clients give are all the same, which changes nothing."""
    replies = await asyncio.gather(*(ask(guard, "two") for _ in range(3)))
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    over = replies[2]
    error = over.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", 429)
    assert "two" in error["message"]
    assert "2 requests in flight, 2 allowed" in error["message"]
    assert over.headers["retry-after"] == "1"
    assert over.headers["x-request-id"] == "the-same"
    remaining = [reply.headers["x-ratelimit-remaining-requests"] for reply in replies]
    assert remaining == ["1", "0", "0"]
    assert (await ask(guard, "two")).status_code == 200


async def test_a_tenant_that_used_too_much_waits_as_long_as_it_is_told(guard: Guard) -> None:
    """Two requests of 50 overdraw 60 tokens a minute by 40, less what came back meanwhile; the
    next one is refused until then, by the header's own count."""
    both = [await ask(guard, "rate") for _ in range(2)]
    assert [reply.headers["x-ratelimit-remaining-tokens"] for reply in both] == ["60", "10"]
    assert both[1].headers["x-ratelimit-reset-tokens"] == "50s"
    over = await ask(guard, "rate")
    assert over.status_code == 429
    assert "60 tokens a minute" in over.json()["error"]["message"]
    wait_s = int(over.headers["retry-after"])
    assert wait_s == 40
    await asyncio.sleep(wait_s - 2)
    assert (await ask(guard, "rate")).status_code == 429
    await asyncio.sleep(2)
    assert (await ask(guard, "rate")).status_code == 200


async def test_a_tenant_without_limits_is_told_of_none(guard: Guard) -> None:
    """No header, no refusal."""
    replies = await asyncio.gather(*(ask(guard, "free") for _ in range(20)))
    assert {reply.status_code for reply in replies} == {200}
    assert not any(name.startswith("x-ratelimit") for name in replies[0].headers)


@pytest.mark.parametrize("path", sorted(ROUTES))
async def test_what_generates_is_limited_and_nothing_else(guard: Guard, path: str) -> None:
    """With both slots taken, listing models and counting tokens still work."""
    holding = [asyncio.create_task(ask(guard, "two")) for _ in range(2)]
    await asyncio.sleep(0.5)
    reply = await ask(guard, "two", path)
    assert reply.status_code == (429 if path in GENERATING else 200)
    await asyncio.gather(*holding)


@pytest.mark.parametrize("status", [400, 500, 503])
async def test_a_failed_request_frees_its_slot(guard: Guard, status: int) -> None:
    """And its response says where the tenant stands, as any other."""
    for _ in range(5):
        reply = await ask(guard, "two", status=status)
        assert reply.status_code == status
        assert reply.headers["x-ratelimit-remaining-requests"] == "1"
        assert reply.headers.get_list("retry-after") == (["1"] if status == 503 else [])


async def test_an_app_that_raises_frees_its_slot(guard: Guard) -> None:
    """The tokens of such a request are debited too."""
    for _ in range(5):
        assert (await ask(guard, "two", fails=True)).status_code == 500
    await ask(guard, "rate", fails=True)
    reply = await ask(guard, "rate")
    assert reply.headers["x-ratelimit-remaining-tokens"] == "10"


async def test_a_stream_holds_its_slot_to_its_end(guard: Guard) -> None:
    """Its headers come with the first token; the slot is free after the last one."""
    streams = [asyncio.create_task(ask(guard, "two", stream=True)) for _ in range(2)]
    await asyncio.sleep(0.95)
    assert (await ask(guard, "two")).status_code == 429
    replies = await asyncio.gather(*streams)
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["1", "0"]
    assert (await ask(guard, "two")).status_code == 200


async def test_a_refusal_of_the_guard_s_own_takes_no_slot(guard: Guard) -> None:
    """Bodies too large are 413 however many came before."""
    for _ in range(5):
        assert (await ask(guard, "two", x="y" * 2000)).status_code == 413
    assert (await ask(guard, "two")).headers["x-ratelimit-remaining-requests"] == "1"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.5, 0.99])
async def test_a_client_that_leaves_frees_its_slot(
    guard: Guard, stream: bool, after_s: float
) -> None:
    """At whatever moment: the app learns of it, ends, and the next request finds both slots."""
    for _ in range(3):
        await _leave(guard, {"stream": stream}, after_s)
    reply = await ask(guard, "two")
    assert reply.headers["x-ratelimit-remaining-requests"] == "1"


async def test_a_cancelled_request_frees_its_slot(guard: Guard) -> None:
    """A server that is shut down cancels its requests."""
    for after_s in (0.0, 0.3, 0.6):
        task = asyncio.create_task(ask(guard, "two"))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert (await ask(guard, "two")).headers["x-ratelimit-remaining-requests"] == "1"


async def _leave(guard: Guard, body: dict[str, Any], after_s: float) -> None:
    """One request whose client is gone after a while."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
    left_at = asyncio.get_running_loop().time() + after_s

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.sleep(left_at - asyncio.get_running_loop().time())
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    headers = [(b"x-api-key", b"two")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    await guard({**scope, "asgi": {"spec_version": "2.3"}}, receive, send)
