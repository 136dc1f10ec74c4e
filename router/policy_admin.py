"""What operators read and order of the routing policy, over HTTP.

`POST /admin/policy` changes state, and a loopback ingress without keys asks nobody who they are, so
what a browser could be made to send from elsewhere is refused: a form's content type, another
origin, and a name that only resolves to this machine.
"""

from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from router.errors import OrderError
from router.orders import FOLLOW_EVERY_S, Change, InForce, Order
from router.policy import Policy
from router.shadow import Shadow, Tally

_MAX_BODY_BYTES = 4096
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_NAMES = ", ".join(Policy)
_WANTED = f'send JSON such as {{"policy": "least_loaded", "shadow": null}}; policies are {_NAMES}'


class PolicyAdmin:
    """The endpoints; `open_to_all` says that no key is asked for."""

    def __init__(self, in_force: InForce, shadow: Shadow, open_to_all: bool) -> None:
        self._in_force, self._shadow, self._open_to_all = in_force, shadow, open_to_all

    async def policy(self, _: Request) -> Response:
        """`GET /admin/policy`: what this ingress goes by, and what was configured."""
        return JSONResponse(self._report(self._in_force.order()))

    async def order(self, request: Request) -> Response:
        """`POST /admin/policy`: order another policy or shadow, for every ingress."""
        refused = _cross_site(request, self._open_to_all)
        if refused is not None:
            return refused
        try:
            change = msgspec.json.decode(await _body(request), type=Change)
        except (msgspec.MsgspecError, UnicodeDecodeError, ClientDisconnect, _TooLong) as error:
            return _error(400, f"{error}; {_WANTED}")
        if change == Change():
            return _error(400, f"nothing to change; {_WANTED}")
        try:
            order = await self._in_force.change(change)
        except OrderError as error:
            return _error(503, str(error))
        return JSONResponse(self._report(order))

    async def shadow(self, _: Request) -> Response:
        """`GET /admin/shadow`: how shadows compare, since this ingress started."""
        tallies = self._shadow.tallies.items()
        return JSONResponse({"shadows": [_tally(*pair, tally) for pair, tally in tallies]})

    def _report(self, order: Order) -> dict[str, Any]:
        configured = msgspec.to_builtins(self._in_force.configured)
        return {**msgspec.to_builtins(order), "configured": configured, "within_s": FOLLOW_EVERY_S}


class _TooLong(Exception):
    """A body that no order needs."""


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise _TooLong(f"a body of more than {_MAX_BODY_BYTES} bytes")
    return bytes(body)


def _cross_site(request: Request, open_to_all: bool) -> Response | None:
    """The refusal of what a page of another site may have made a browser send."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return _error(415, f"content-type is {kind[:40] or 'missing'}, application/json wanted")
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and origin != f"{request.scope['scheme']}://{host}":
        complaint = f"orders from the origin {origin[:80]} are refused; use `breakeven policy`"
        return _error(403, complaint)
    if open_to_all and _hostname(host) not in _LOOPBACK:
        complaint = f"orders to the host {host[:80]} are refused without keys; use 127.0.0.1"
        return _error(403, complaint)
    return None


def _hostname(host: str) -> str:
    """A Host header without its port."""
    bracketed = host.startswith("[")
    return host[1:].partition("]")[0] if bracketed else host.partition(":")[0].lower()


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def _tally(policy: Policy, shadow: Policy, tally: Tally) -> dict[str, Any]:
    mean_s = tally.mean_difference_s
    return {
        "policy": policy,
        "shadow": shadow,
        "compared": tally.compared,
        "outcomes": dict(tally.outcomes),
        "mean_ttft_difference_s": None if mean_s is None else round(mean_s, 6),
    }
