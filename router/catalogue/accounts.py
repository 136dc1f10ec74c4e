"""Tenants' accounts of all ingresses of a node."""

from collections.abc import Callable

from router.catalogue.wire import Enter, Held, Leave
from router.limits import LocalLedger, Standing


class Accounts:
    """One ledger for several ingresses; what a lost one held is given back."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._ledger = LocalLedger(now)
        self._held: dict[str, dict[str, Leave]] = {}

    def enter(self, ingress: str, enter: Enter) -> Standing:
        """Where the tenant stands; unless refused, the request holds a slot."""
        standing = self._ledger.take(enter.tenant, enter.limits, enter.request_id)
        if standing.refused is None:
            unused = Leave(enter.tenant, enter.limits, enter.request_id, 0)
            self._held.setdefault(ingress, {})[enter.request_id] = unused
        return standing

    def held(self, ingress: str, held: Held) -> None:
        """A request that entered under another catalogue, or over another connection."""
        for others in self._held.values():
            others.pop(held.request_id, None)
        self._ledger.hold(held.tenant, held.request_id)
        unused = Leave(held.tenant, held.limits, held.request_id, 0)
        self._held.setdefault(ingress, {})[held.request_id] = unused

    def leave(self, ingress: str, leave: Leave) -> None:
        """A request has ended."""
        self._held.get(ingress, {}).pop(leave.request_id, None)
        self._ledger.leave(leave.tenant, leave.limits, leave.request_id, leave.tokens)

    def lose(self, ingress: str) -> None:
        """An ingress is gone: nobody will say what its requests used."""
        for leave in self._held.pop(ingress, {}).values():
            self._ledger.leave(leave.tenant, leave.limits, leave.request_id, 0)
