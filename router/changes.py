"""Requests to /admin that change something: what they must look like, read in one place.

A page in an operator's browser can send requests to whatever that browser reaches, with or without
an admin key. It cannot send JSON to another site without asking first, and browsers name the
origin of every POST; programs do not. Nothing here is meant for a page, so both are refused, and so
is, where no key is asked for, a host name that only resolves to this machine.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_MAX_BODY_BYTES = 65_536
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
T = TypeVar("T")


def changing(
    wanted: type[T],
    carry_out: Callable[[T], Awaitable[Response]],
    open_to_all: bool,
    example: str,
) -> Callable[[Request], Awaitable[Response]]:
    """A handler that reads a `wanted` from a JSON body, refuses anything else, and carries it
    out; `open_to_all` says that no key is asked for, `example` what would be taken."""

    async def answer(request: Request) -> Response:
        refusal = refused(request, open_to_all)
        if refusal is not None:
            return refusal
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                return _refusal(413, f"a body of more than {_MAX_BODY_BYTES} bytes")
        try:
            asked = msgspec.json.decode(body, type=wanted)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return _refusal(400, f"the body: {error}; send JSON such as {example}")
        return await carry_out(asked)

    return answer


def refused(request: Request, open_to_all: bool) -> Response | None:
    """Why a request may change nothing, or None."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return _refusal(415, f"content-type is {kind[:40]!r}; send application/json")
    site = request.headers.get("sec-fetch-site", "none")
    if "origin" in request.headers or site != "none":
        return _refusal(403, "sent by a page in a browser; use `breakeven` or another program")
    host = request.headers.get("host", "")
    if open_to_all and _hostname(host) not in _LOOPBACK:
        return _refusal(403, f"the host {host[:80]!r} is not loopback, and there are no keys")
    return None


def _hostname(host: str) -> str:
    """A Host header without its port."""
    bracketed = host.startswith("[")
    return host[1:].partition("]")[0] if bracketed else host.partition(":")[0].lower()


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status)
