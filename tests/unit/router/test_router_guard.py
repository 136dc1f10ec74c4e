"""The guard in front of an app that shows what reached it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kv.codecs.codec import CodecName
from router.context import CLASS_OF_TIER, ServiceClass, bound
from router.guard import Guard
from router.intake import ROUTES, entered

SECRET = b"secret"
LIMIT_BYTES = 1000
CHAT = "/v1/chat/completions"
STEERING = {
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "evil"},
    "ec_transfer_params": {},
    "kv_hints": {"pin": True},
    "priority": -100,
    "session_id": "s",
    "data_parallel_rank": 1,
    "request_id": "victim",
    "vllm_xargs": {"kv_transfer_params": "x"},
}


async def echo(request: Request) -> Response:
    """The body, headers and context that the app sees."""
    asked = bound.get()
    assert asked is not None
    asked.notes.plan = "local; hit=0"
    body = await request.body()
    context = asked.context
    return JSONResponse(
        {
            "body": body.decode("latin-1"),
            "headers": dict(request.headers),
            "class": context.service_class,
            "cache_key": context.cache_key,
            "safety": context.safety_identifier,
            "retention_s": context.retention_s,
            "request_id": context.request_id,
        },
        status_code=int(request.headers.get("x-status", 200)),
    )


async def unplanned(_: Request) -> Response:
    return JSONResponse({"data": []})


APP = Starlette(
    routes=[
        Route(CHAT, echo, methods=["POST"]),
        Route("/v1/models", unplanned),
        Route("/collective_rpc", echo, methods=["POST"]),
    ]
)


def client(app: Any = APP) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Guard(app, LIMIT_BYTES))
    return httpx.AsyncClient(transport=transport, base_url="http://guard")


async def post(body: Any, **headers: str) -> Any:
    """What the app saw of a POST; `body` is JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client() as http:
        reply = await http.post(CHAT, content=content, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """An OpenAI-shaped error."""
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == reply.status_code
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    "path",
    ["/collective_rpc", "/v1", "/", "/v1/chat/completions/", "/v1/../collective_rpc", "/reset"],
)
async def test_what_is_not_listed_is_not_there(path: str) -> None:
    """A route that the app serves but the list lacks is a 404 that names it."""
    async with client() as http:
        reply = await http.post(path, content=b"{}")
    assert reply.status_code == 404
    assert "no such route" in error_of(reply)["message"]


async def test_a_known_api_that_is_not_served_says_so() -> None:
    """Somebody who asks for embeddings learns that this cluster generates text."""
    async with client() as http:
        reply = await http.post("/v1/embeddings", content=b"{}")
    assert reply.status_code == 404
    assert "embeddings are not served" in error_of(reply)["message"]


@pytest.mark.parametrize(("path", "methods"), ROUTES.items())
async def test_other_methods_are_refused(path: str, methods: set[str]) -> None:
    """A listed path with another method is a 405 that names the right one."""
    async with client() as http:
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - methods:
            reply = await http.request(method, path)
            assert reply.status_code == 405
            assert f"use {next(iter(methods))}" in error_of(reply)["message"]


async def test_a_body_that_declares_too_much_is_refused() -> None:
    """413 with both numbers, before it is read."""
    async with client() as http:
        reply = await http.post(CHAT, content=b"{}", headers={"content-length": "1001"})
    assert reply.status_code == 413
    assert "1001 bytes, 1000 allowed" in error_of(reply)["message"]


async def test_a_body_that_streams_too_much_is_refused() -> None:
    """Without a declared length the bytes are counted as they come, and no more is read."""
    read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 300
            yield b"x" * 300

    async with client() as http:
        reply = await http.post(CHAT, content=chunks())
    assert reply.status_code == 413
    assert read < 2000


async def test_a_body_of_the_limit_enters() -> None:
    """The limit itself is allowed, and the body arrives as it was sent."""
    body = b'{"x":"' + b"y" * (LIMIT_BYTES - 8) + b'"}'
    assert (await post(body))["body"].encode() == body


async def test_a_harmless_body_is_not_touched() -> None:
    """Bytes, spaces and order stay; only what steers is worth a re-encoding."""
    body = b'{ "b": 1.50,  "a": "\\u00e9", "logit_bias": {"1": 2}}'
    seen = await post(body)
    assert seen["body"].encode() == body
    assert seen["headers"]["content-length"] == str(len(body))


@pytest.mark.parametrize("name", STEERING)
async def test_what_steers_the_cluster_is_removed(name: str) -> None:
    """Each such field goes, whatever its value; the others and the length stay right."""
    for value in (STEERING[name], None):
        seen = await post({"model": "m", name: value, "top_p": 0.5})
        assert json.loads(seen["body"]) == {"model": "m", "top_p": 0.5}
        assert seen["headers"]["content-length"] == str(len(seen["body"]))


@pytest.mark.parametrize(
    "body",
    [
        b'{"priority": 5, "x": NaN}',
        b'{"priority": 5, "x": -Infinity}',
        b'{"priority": 5, "x": "\\ud800"}',
        b'{"priority": 5, "x": 1e999}',
        b'{"priority": 5, "x": 123456789012345678901234567890}',
        b'{"priority": 5, "priority": 6}',
        b'{"\\u0070riority": 5}',
        '{"priority": 5}'.encode("utf-16-le"),
    ],
)
async def test_no_spelling_gets_a_field_past_the_guard(body: bytes) -> None:
    """Whatever Python's json, which vLLM uses, reads from the body has no such field."""
    seen = await post(body)
    assert "priority" not in json.loads(seen["body"].encode("latin-1"))


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"priority"', b"nul", b"{'a': 1}"])
async def test_a_body_that_is_no_object_is_left_to_vllm(body: bytes) -> None:
    """vLLM words those errors; they steer nothing."""
    assert (await post(body))["body"].encode() == body


@pytest.mark.parametrize("value", [[], [1], 3, "a", True, 0.5])
async def test_a_field_that_vllm_takes_for_an_object_is_one(value: object) -> None:
    """vLLM reads keys of `structured_outputs` before it checks its type, and answered 500."""
    async with client() as http:
        reply = await http.post(CHAT, json={"messages": [], "structured_outputs": value})
    assert reply.status_code == 400
    assert "structured_outputs is a JSON" in error_of(reply)["message"]
    for fine in (None, {}, {"regex": "a"}):
        await post({"messages": [], "structured_outputs": fine})


async def test_a_body_nested_without_end_is_refused() -> None:
    """Too deep to parse is the client's error."""
    deep = Guard(APP, 10_000_000, SECRET)
    transport = httpx.ASGITransport(deep)
    async with httpx.AsyncClient(transport=transport, base_url="http://guard") as http:
        reply = await http.post(CHAT, content=b"[" * 200_000)
    assert reply.status_code == 400
    error_of(reply)


@pytest.mark.parametrize("body", [b"\xff\xfe", b'{"a": "\xe9"}', b'{"a": "\xed\xa0\x80"}'])
async def test_a_body_that_is_no_utf_8_is_refused(body: bytes) -> None:
    """The error says at which byte."""
    async with client() as http:
        reply = await http.post(CHAT, content=body)
    assert reply.status_code == 400
    assert f"not UTF-8 at byte {0 if body[0] == 0xFF else 7}" in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("asked", "most_s", "given_s"),
    [
        (None, None, None),
        (None, 9.0, 9.0),
        ("2.5", None, 2.5),
        ("2.5", 1.0, 1.0),
        ("1e3", 2e3, 1e3),
    ],
)
async def test_a_request_s_time_is_the_lower_of_both(
    asked: str | None, most_s: float | None, given_s: float | None
) -> None:
    """The client may ask for less than is configured, never for more."""
    seen: list[float | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked_now = bound.get()
        assert asked_now is not None
        seen.append(asked_now.context.timeout_s)
        await JSONResponse({})(scope, receive, send)

    transport = httpx.ASGITransport(Guard(app, LIMIT_BYTES, most_s))
    headers = {} if asked is None else {"x-request-timeout": asked}
    async with httpx.AsyncClient(transport=transport, base_url="http://guard") as http:
        assert (await http.post(CHAT, content=b"{}", headers=headers)).status_code == 200
    assert seen == [given_s]


@pytest.mark.parametrize("asked", ["0", "-1", "nan", "inf", "soon", "1e999"])
async def test_a_timeout_that_is_no_time_is_refused(asked: str) -> None:
    """What is no positive number of seconds is a 400 that shows it."""
    async with client() as http:
        reply = await http.post(CHAT, content=b"{}", headers={"x-request-timeout": asked})
    assert reply.status_code == 400
    assert asked in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("asked", "codec"), [(None, None), ("int8", CodecName.INT8), ("TQ4", CodecName.TQ4)]
)
async def test_a_client_may_allow_a_lossy_codec(asked: str | None, codec: CodecName | None) -> None:
    """By a header, whatever its case; nobody who does not is served from rounded blocks."""
    seen: list[CodecName | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked_now = bound.get()
        assert asked_now is not None
        seen.append(asked_now.context.codec)
        await JSONResponse({})(scope, receive, send)

    transport = httpx.ASGITransport(Guard(app, LIMIT_BYTES))
    headers = {} if asked is None else {"x-breakeven-codec": asked}
    async with httpx.AsyncClient(transport=transport, base_url="http://guard") as http:
        assert (await http.post(CHAT, content=b"{}", headers=headers)).status_code == 200
    assert seen == [codec]


async def test_a_codec_that_is_none_is_refused() -> None:
    """With the names that there are: a typing error would go unnoticed otherwise."""
    async with client() as http:
        reply = await http.post(CHAT, content=b"{}", headers={"x-breakeven-codec": "int9"})
    assert reply.status_code == 400
    message = error_of(reply)["message"]
    assert "'int9'" in message
    assert "int8" in message


async def test_openai_s_fields_are_bound_to_the_request() -> None:
    """Class, cache key and safety identifier reach the cluster, and stay in the body."""
    fields = {"service_tier": "flex", "prompt_cache_key": "k", "safety_identifier": "u"}
    seen = await post(fields)
    assert (seen["class"], seen["cache_key"], seen["safety"]) == ("batch", "k", "u")
    assert json.loads(seen["body"]) == fields


@pytest.mark.parametrize(
    ("asked", "kept_s"),
    [("24h", 86_400.0), ("in_memory", None), ("1h", None), (None, None), (24, None), ({}, None)],
)
async def test_a_day_s_retention_is_bound_to_the_request(
    asked: object, kept_s: float | None
) -> None:
    """What is not OpenAI's word for a day asks for what is usual, and fails nothing here."""
    seen = await post({} if asked is None else {"prompt_cache_retention": asked})
    assert seen["retention_s"] == kept_s


@pytest.mark.parametrize("tier", ["auto", "default", "scale", "priority", "standard_only", None])
async def test_every_other_tier_is_interactive(tier: object) -> None:
    """Only flex waits."""
    assert (await post({"service_tier": tier}))["class"] == ServiceClass.INTERACTIVE


@pytest.mark.parametrize(
    ("tier", "told"),
    [
        ("unheard-of", "'unheard-of'"),
        ("", "''"),
        ("FLEX", "'FLEX'"),
        ("flex\n", r"'flex\n'"),
        ("x" * 500, "'xxxx"),
        ([1], "a JSON list"),
        (["flex"], "a JSON list"),
        ({"flex": 1}, "a JSON dict"),
        (1, "a JSON int"),
        (True, "a JSON bool"),
        (0.5, "a JSON float"),
    ],
)
async def test_a_tier_that_makes_no_sense_is_refused(tier: object, told: str) -> None:
    """With what was sent, cut short, and what may be; it reaches nobody."""
    async with client() as http:
        reply = await http.post(CHAT, content=json.dumps({"service_tier": tier}).encode())
    assert reply.status_code == 400
    message = error_of(reply)["message"]
    assert told in message
    assert "give one of auto, default, scale, priority, flex" in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("tier", "usual", "used"),
    [
        ("auto", ServiceClass.BATCH, "flex"),
        (None, ServiceClass.BATCH, "flex"),
        ("default", ServiceClass.BATCH, "default"),
        ("auto", ServiceClass.INTERACTIVE, "default"),
        ("flex", ServiceClass.INTERACTIVE, "flex"),
    ],
)
def test_the_responses_api_repeats_the_tier_that_is_used(
    tier: str | None, usual: ServiceClass, used: str
) -> None:
    """vLLM gives back what was asked there; elsewhere the body stays as it was sent."""
    body = json.dumps({"input": "x"} | ({} if tier is None else {"service_tier": tier})).encode()
    context, sent = entered("r", body, "/v1/responses", usual)
    assert json.loads(sent) == {"input": "x", "service_tier": used}
    assert context.service_class == CLASS_OF_TIER[used]
    assert entered("r", body, CHAT, usual) == (context, body)


async def test_headers_that_steer_are_removed() -> None:
    """Ranks, sessions and ids are the cluster's to choose; other headers pass."""
    given = {"x-data-parallel-rank": "1", "x-session-id": "s", "x-mine": "1"}
    seen = await post({}, **given)
    assert seen["headers"]["x-mine"] == "1"
    assert not {"x-data-parallel-rank", "x-session-id"} & seen["headers"].keys()


async def test_a_caller_s_request_id_is_kept() -> None:
    """It comes back and is the request's name in the cluster."""
    async with client() as http:
        reply = await http.post(CHAT, content=b"{}", headers={"x-request-id": "abc-1"})
    assert reply.headers.get_list("x-request-id") == ["abc-1"]
    assert reply.json()["request_id"] == "abc-1"


@pytest.mark.parametrize(
    "given", [b"", b"a\r\nx-evil: 1", b"a b", "é".encode(), b"\xff", b"x" * 129]
)
async def test_an_odd_request_id_is_replaced(given: bytes) -> None:
    """Nothing that could break a header or a log line is reflected; a new id is made."""
    async with client() as http:
        reply = await http.post(CHAT, content=b"{}", headers=[(b"x-request-id", given)])
    [made] = reply.headers.get_list("x-request-id")
    assert made.startswith("req-")
    assert reply.json()["request_id"] == made
    assert "x-evil" not in reply.headers


async def test_two_requests_have_two_ids() -> None:
    """Made ids are unique."""
    assert (await post({}))["request_id"] != (await post({}))["request_id"]


async def test_the_plan_is_shown_where_there_is_one() -> None:
    """Generation shows its plan; a listing has none."""
    async with client() as http:
        generated = await http.post(CHAT, content=b"{}")
        listed = await http.get("/v1/models")
    assert generated.headers["x-breakeven-plan"] == "local; hit=0"
    assert "x-breakeven-plan" not in listed.headers
    assert listed.headers["x-request-id"]


@pytest.mark.parametrize(("status", "shown"), [(200, []), (503, ["1"]), (429, ["1"]), (500, [])])
async def test_overload_says_when_to_come_again(status: int, shown: list[str]) -> None:
    """429 and 503 carry Retry-After, once."""
    async with client() as http:
        reply = await http.post(CHAT, content=b"{}", headers={"x-status": str(status)})
    assert reply.status_code == status
    assert reply.headers.get_list("retry-after") == shown


@pytest.mark.looptime(start=0, idle_timeout=0)
async def test_a_stream_passes_chunk_by_chunk() -> None:
    """A token is on the wire before the next one exists; headers wait for the first, not longer."""
    sent: list[tuple[float, str, bytes]] = []

    async def ticking() -> AsyncIterator[bytes]:
        for number in range(3):
            await asyncio.sleep(1.0)
            yield b"%d" % number

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        await StreamingResponse(ticking())(scope, receive, send)

    async def send(message: Any) -> None:
        now = asyncio.get_running_loop().time()
        sent.append((now, message["type"], message.get("body", b"")))

    await Guard(streaming, LIMIT_BYTES, SECRET)(scope(), body_then(asyncio.Event()), send)
    assert sent == [
        (1.0, "http.response.start", b""),
        (1.0, "http.response.body", b"0"),
        (2.0, "http.response.body", b"1"),
        (3.0, "http.response.body", b"2"),
        (3.0, "http.response.body", b""),
    ]


@pytest.mark.looptime(start=0, idle_timeout=0)
async def test_a_disconnect_reaches_the_app() -> None:
    """The body is replayed once; what the app receives next is the client's leaving."""
    left = asyncio.Event()
    seen: list[Any] = []

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        asyncio.get_running_loop().call_later(5.0, left.set)
        seen.append(await receive())
        assert asyncio.get_running_loop().time() == pytest.approx(5.0)

    await Guard(listening, LIMIT_BYTES, SECRET)(scope(), body_then(left), never)
    assert seen == [
        {"type": "http.request", "body": b"{}", "more_body": False},
        {"type": "http.disconnect"},
    ]


async def test_a_client_that_leaves_before_its_body_is_over_reaches_nothing() -> None:
    """Half a request is not passed on."""

    async def unreachable(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("half a request arrived")

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await Guard(unreachable, LIMIT_BYTES, SECRET)(scope(), leave, send)
    assert sent[0]["status"] == 400


async def test_the_context_ends_with_its_request() -> None:
    """Nothing is bound outside a request, even after one that failed."""

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        assert bound.get() is not None
        raise RuntimeError("app")

    with pytest.raises(RuntimeError, match="app"):
        await Guard(failing, LIMIT_BYTES, SECRET)(scope(), body_then(asyncio.Event()), never)
    assert bound.get() is None


async def test_a_websocket_reaches_nothing() -> None:
    """vLLM's realtime API is not served."""

    async def unreachable(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("a websocket arrived")

    await Guard(unreachable, LIMIT_BYTES, SECRET)({"type": "websocket"}, never, never)


def scope() -> Any:
    return {"type": "http", "method": "POST", "path": CHAT, "headers": []}


def body_then(left: asyncio.Event) -> Any:
    """A receive: the whole body, then a disconnect once `left` is set."""
    messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    return receive


async def never(*_: Any) -> Any:
    raise AssertionError("not expected")
