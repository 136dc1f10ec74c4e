"""What operators read and order of the routing policy, over HTTP."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from router.errors import OrderError
from router.orders import FOLLOW_EVERY_S, Change, InForce, Order
from router.policy import Policy
from router.shadow import Shadow, Tally

_NAMES = ", ".join(Policy)
EXAMPLE = f'{{"policy": "least_loaded", "shadow": null}}; policies are {_NAMES}'


class PolicyAdmin:
    """The endpoints."""

    def __init__(self, in_force: InForce, shadow: Shadow) -> None:
        self._in_force, self._shadow = in_force, shadow

    async def policy(self, _: Request) -> Response:
        """`GET /admin/policy`: what this ingress goes by, and what was configured."""
        return JSONResponse(self._report(self._in_force.order()))

    async def order(self, change: Change) -> Response:
        """`POST /admin/policy`: order another policy or shadow, for every ingress."""
        if change == Change():
            return _error(400, f"nothing to change; send JSON such as {EXAMPLE}")
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
