"""Tenants' limits, held to over every ingress of a node."""

from collections.abc import Callable

from router.catalogue import wire
from router.catalogue.client import CatalogueLine
from router.errors import RateLimitError
from router.limits import Limits, LocalLedger, Standing


class SharedLedger:
    """A `Ledger` kept by the catalogue. While that cannot be asked, this ingress holds its tenants
    to the limits by itself: what it knows of their requests is its own."""

    def __init__(self, line: CatalogueLine, now: Callable[[], float]) -> None:
        self._line, self._own = line, LocalLedger(now)

    async def enter(self, tenant: str, limits: Limits, request_id: str) -> Standing:
        """See `Ledger`."""
        reply = await self._line.ask(lambda number: wire.Enter(number, tenant, limits, request_id))
        if not isinstance(reply, wire.Stands):
            standing = await self._own.enter(tenant, limits, request_id)
            self._line.tell(wire.Held(tenant, limits, request_id))
        elif reply.standing.refused is not None:
            raise RateLimitError(tenant, reply.standing)
        else:
            standing = reply.standing
            self._own.hold(tenant, request_id)
        self._line.stands(_name(request_id), wire.Held(tenant, limits, request_id))
        return standing

    def leave(self, tenant: str, limits: Limits, request_id: str, tokens: int) -> None:
        """See `Ledger`."""
        self._line.stands(_name(request_id), None)
        self._line.tell(wire.Leave(tenant, limits, request_id, tokens))
        self._own.leave(tenant, limits, request_id, tokens)


def _name(request_id: str) -> str:
    return f"slot {request_id}"
