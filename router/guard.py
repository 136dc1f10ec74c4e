"""The outermost layer of the HTTP side: who may enter, under which name, and within which limits.

A plain ASGI middleware, since it must see bodies before vLLM parses them and hold back response
headers until the plan is known. `router.intake` reads what was sent.
"""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace

from starlette.responses import JSONResponse

from router.access import KeyRing
from router.admission import Admission
from router.asgi import App, Message, Receive, Scope, Send
from router.context import (
    DEFAULT_TENANT,
    Bound,
    Notes,
    RequestContext,
    ServiceClass,
    bound,
)
from router.errors import AccessError, RateLimitError
from router.intake import (
    GENERATING,
    Headers,
    Refusal,
    check_route,
    codec_of,
    entered,
    read_body,
    replayed,
    request_id_of,
    resized,
    timeout_of,
)
from router.limits import Ledger, headers, slot


class Guard:
    """Wraps vLLM's app. `max_body_bytes` bounds a request body; `timeout_s` bounds a request's
    time, and so does its header x-request-timeout; with `keys`, each request needs one, and
    `ledger` holds their tenants to the limits that stand there. `admissions` are where calls of
    each class reserve places."""

    def __init__(
        self,
        app: App,
        max_body_bytes: int,
        timeout_s: float | None = None,
        keys: KeyRing | None = None,
        ledger: Ledger | None = None,
        admissions: Mapping[ServiceClass, Admission] | None = None,
    ) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._timeout_s, self._keys, self._ledger = timeout_s, keys, ledger
        self._admissions = admissions or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request_id, notes = request_id_of(scope), Notes()
        async with AsyncExitStack() as held:
            try:
                context, body = await self._checked(scope, receive, request_id)
                limited = await self._slot(held, scope["path"], context.tenant, notes)
            except Refusal as refusal:
                await _refuse(refusal, request_id)(scope, receive, send)
                return
            if context.service_class in self._admissions:
                held.callback(self._admissions[context.service_class].release, notes)
            token = bound.set(Bound(context, notes))
            try:
                reply = _Reply(send, request_id, notes, limited)
                await self._app(resized(scope, body), replayed(body, receive), reply.send)
            finally:
                bound.reset(token)

    async def _checked(
        self, scope: Scope, receive: Receive, request_id: str
    ) -> tuple[RequestContext, bytes]:
        """The request's context and body, once all that can be checked here is well."""
        check_route(scope["method"], scope["path"])
        tenant = _tenant(scope, self._keys)
        usual = self._keys.service_class(tenant) if self._keys else ServiceClass.INTERACTIVE
        body = await read_body(scope, receive, self._max_body_bytes)
        context, body = entered(request_id, body, scope["path"], usual)
        timeout_s = timeout_of(scope, self._timeout_s)
        context = replace(context, tenant=tenant, timeout_s=timeout_s, codec=codec_of(scope))
        return context, body

    async def _slot(
        self, held: AsyncExitStack, path: str, tenant: str, notes: Notes
    ) -> list[tuple[bytes, bytes]]:
        """Take a slot until `held` ends, if the tenant is limited; the headers that tell of it."""
        limits = self._keys.limits(tenant) if self._keys else None
        if limits is None or self._ledger is None or path not in GENERATING:
            return []
        try:
            held_slot = slot(self._ledger, tenant, limits, notes)
            return headers(await held.enter_async_context(held_slot))
        except RateLimitError as error:
            again = (b"retry-after", str(error.standing.retry_after_s).encode())
            told = (again, *headers(error.standing))
            raise Refusal(429, str(error), "rate_limit_error", told) from error


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


def _tenant(scope: Scope, keys: KeyRing | None) -> str:
    """Whose key came with the request; everybody's without a key file."""
    if keys is None:
        return DEFAULT_TENANT
    try:
        return keys.tenant(bearer(scope))
    except AccessError as error:
        raise Refusal(401, str(error), "AuthenticationError") from error


def bearer(scope: Scope) -> str | None:
    """The key of a request: `Authorization: Bearer KEY`, or Anthropic's `x-api-key`."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1") or None


def _refuse(refusal: Refusal, request_id: str) -> JSONResponse:
    error = {"message": refusal.message, "type": refusal.kind, "param": None}
    body = {"error": {**error, "code": refusal.status}}
    told = {name.decode(): value.decode() for name, value in refusal.headers}
    return JSONResponse(body, refusal.status, {"x-request-id": request_id, **told})
