"""The outermost layer of the HTTP side: what may enter, and under which name.

A plain ASGI middleware, since it must see bodies before vLLM parses them and hold back response
headers until the plan is known. Everything that a client could steer the cluster with is removed
here; the rest of the body reaches vLLM as it was sent.
"""

import json
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

from starlette.responses import JSONResponse

from router.access import KeyRing
from router.admission import Admission
from router.context import (
    CLASS_OF_TIER,
    DEFAULT_TENANT,
    Bound,
    Notes,
    RequestContext,
    ServiceClass,
    bound,
)
from router.errors import AccessError, RateLimitError
from router.limits import Ledger, headers, slot

Headers = Iterable[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What vLLM's app serves through us; everything else it mounts stays unreachable.
ROUTES = {
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/responses": {"POST"},
    "/v1/messages": {"POST"},
    "/v1/messages/count_tokens": {"POST"},
    "/v1/models": {"GET"},
    "/tokenize": {"POST"},
    "/detokenize": {"POST"},
    "/version": {"GET"},
}
# Those that generate, to which tenants' limits apply.
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_NOT_SERVED = {
    "/v1/embeddings": "embeddings",
    "/v1/images/generations": "images",
    "/v1/audio/transcriptions": "audio",
    "/v1/audio/speech": "audio",
    "/v1/rerank": "reranking",
    "/v1/load_lora_adapter": "LoRA adapters",
}
# Fields by which a body could reach into engines, caches or queues.
_STEERING = (
    "kv_transfer_params",
    "ec_transfer_params",
    "kv_hints",
    "priority",
    "session_id",
    "data_parallel_rank",
    "request_id",
    "vllm_xargs",
)
# vLLM looks into these before it has checked that they are objects.
_OBJECTS = ("structured_outputs",)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class _Refusal(Exception):
    status: int
    message: str
    kind: str = "BadRequestError"
    headers: Headers = ()


class Guard:
    """Wraps vLLM's app. `max_body_bytes` bounds a request body; `timeout_s` bounds a request's
    time, and so does its header x-request-timeout; with `keys`, each request needs one, and
    `ledger` holds their tenants to the limits that stand there. `admission` is where calls reserve
    places."""

    def __init__(
        self,
        app: App,
        max_body_bytes: int,
        timeout_s: float | None = None,
        keys: KeyRing | None = None,
        ledger: Ledger | None = None,
        admission: Admission | None = None,
    ) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._timeout_s, self._keys, self._ledger = timeout_s, keys, ledger
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request_id, notes = _request_id(scope), Notes()
        async with AsyncExitStack() as held:
            try:
                context, body = await self._checked(scope, receive, request_id)
                limited = await self._slot(held, scope["path"], context.tenant, notes)
            except _Refusal as refusal:
                await _refuse(refusal, request_id)(scope, receive, send)
                return
            if self._admission is not None:
                held.callback(self._admission.release, notes)
            token = bound.set(Bound(context, notes))
            try:
                reply = _Reply(send, request_id, notes, limited)
                await self._app(_sized(scope, body), _replay(body, receive), reply.send)
            finally:
                bound.reset(token)

    async def _checked(
        self, scope: Scope, receive: Receive, request_id: str
    ) -> tuple[RequestContext, bytes]:
        """The request's context and body, once all that can be checked here is well."""
        _check_route(scope["method"], scope["path"])
        tenant = _tenant(scope, self._keys)
        body = await _read(scope, receive, self._max_body_bytes)
        context, body = _enter(request_id, body)
        timeout_s = _timeout_s(scope, self._timeout_s)
        return replace(context, tenant=tenant, timeout_s=timeout_s), body

    async def _slot(
        self, held: AsyncExitStack, path: str, tenant: str, notes: Notes
    ) -> list[tuple[bytes, bytes]]:
        """Take a slot until `held` ends, if the tenant is limited; the headers that tell of it."""
        limits = self._keys.limits(tenant) if self._keys else None
        if limits is None or self._ledger is None or path not in GENERATING:
            return []
        try:
            entered = slot(self._ledger, tenant, limits, notes)
            return headers(await held.enter_async_context(entered))
        except RateLimitError as error:
            again = (b"retry-after", str(error.standing.retry_after_s).encode())
            told = (again, *headers(error.standing))
            raise _Refusal(429, str(error), "rate_limit_error", told) from error


class _Reply:
    """Holds the start of a response until its first bytes: the plan is known by then."""

    def __init__(self, send: Send, request_id: str, notes: Notes, limited: Headers) -> None:
        self._send, self._request_id, self._notes = send, request_id, notes
        self._limited = limited
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            start["headers"] = [*start.get("headers", ()), *self._headers(start["status"])]
            await self._send(start)
        await self._send(message)

    def _headers(self, status: int) -> list[tuple[bytes, bytes]]:
        told = [(b"x-request-id", self._request_id.encode()), *self._limited]
        if self._notes.plan is not None:
            told.append((b"x-breakeven-plan", self._notes.plan.encode()))
        if status in (429, 503):
            told.append((b"retry-after", b"1"))
        return told


def _enter(request_id: str, body: bytes) -> tuple[RequestContext, bytes]:
    """The request's context, and its body without what steers the cluster."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise _Refusal(400, f"the body is not UTF-8 at byte {error.start}") from error
    try:
        # The parser of vLLM's app: a stricter one would let past what it cannot read.
        fields = json.loads(body)
    except RecursionError as error:
        raise _Refusal(400, "the body is nested too deeply") from error
    except ValueError:
        return RequestContext(request_id), body  # vLLM words the error
    if not isinstance(fields, dict):
        return RequestContext(request_id), body
    _check_objects(fields)
    context = RequestContext(
        request_id=request_id,
        service_class=_service_class(fields.get("service_tier")),
        cache_key=_text(fields, "prompt_cache_key"),
        safety_identifier=_text(fields, "safety_identifier"),
    )
    removed = [fields.pop(name) for name in _STEERING if name in fields]
    return context, json.dumps(fields).encode() if removed else body


def _check_objects(fields: dict[str, Any]) -> None:
    for name in _OBJECTS:
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise _Refusal(400, f"{name} is a JSON {type(value).__name__}; an object is wanted")


def _tenant(scope: Scope, keys: KeyRing | None) -> str:
    """Whose key came with the request; everybody's without a key file."""
    if keys is None:
        return DEFAULT_TENANT
    try:
        return keys.tenant(bearer(scope))
    except AccessError as error:
        raise _Refusal(401, str(error), "AuthenticationError") from error


def bearer(scope: Scope) -> str | None:
    """The key of a request: `Authorization: Bearer KEY`, or Anthropic's `x-api-key`."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1") or None


def _check_route(method: str, path: str) -> None:
    allowed = ROUTES.get(path)
    if allowed is None:
        what = _NOT_SERVED.get(path)
        served = f"{what} are not served: this cluster generates text" if what else "no such route"
        raise _Refusal(404, f"{method} {path}: {served}", "NotFoundError")
    if method not in allowed:
        raise _Refusal(405, f"{method} {path}: use {', '.join(sorted(allowed))}")


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _Refusal(400, "the client left before its request was read")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise _too_large(size, limit)
        if not message.get("more_body"):
            return b"".join(chunks)


def _too_large(size: int, limit: int) -> _Refusal:
    return _Refusal(413, f"a body of {size} bytes, {limit} allowed", "RequestEntityTooLarge")


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()  # what follows a body is the disconnect
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _sized(scope: Scope, body: bytes) -> Scope:
    """`scope` with the length of the body that is replayed."""
    kept = [(k, v) for k, v in scope["headers"] if k not in _BODY_HEADERS and k not in _STEERING_H]
    return {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}


_BODY_HEADERS = (b"content-length", b"transfer-encoding")
# And the client's key, which nothing behind this layer needs.
_STEERING_H = (
    b"x-data-parallel-rank",
    b"x-vllm-priority",
    b"x-session-id",
    b"x-request-id",
    b"authorization",
    b"x-api-key",
)


def _refuse(refusal: _Refusal, request_id: str) -> JSONResponse:
    error = {"message": refusal.message, "type": refusal.kind, "param": None}
    body = {"error": {**error, "code": refusal.status}}
    told = {name.decode(): value.decode() for name, value in refusal.headers}
    return JSONResponse(body, refusal.status, {"x-request-id": request_id, **told})


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _timeout_s(scope: Scope, most_s: float | None) -> float | None:
    """What the client's x-request-timeout asks for, at most what is configured."""
    given = dict(scope["headers"]).get(b"x-request-timeout", b"").decode("latin-1")
    if not given:
        return most_s
    try:
        asked_s = float(given)
    except ValueError:
        asked_s = nan
    if not (isfinite(asked_s) and asked_s > 0):
        raise _Refusal(400, f"x-request-timeout is {given[:40]!r}; give seconds above 0")
    return asked_s if most_s is None else min(asked_s, most_s)


def _service_class(tier: object) -> ServiceClass:
    return (
        CLASS_OF_TIER.get(tier, ServiceClass.INTERACTIVE)
        if isinstance(tier, str)
        else (ServiceClass.INTERACTIVE)
    )


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None
