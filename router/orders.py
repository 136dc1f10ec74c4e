"""Which policy is in force: the configured one, until an operator orders another.

An order lies where every ingress of a cluster reads it, so that one request to any of them reaches
all. Each looks once a second; in between it goes on under the order that it knows, and so it does
while the store cannot be reached or has lost the order.
"""

import asyncio
import logging
from typing import Protocol

import msgspec

from router.errors import OrderError
from router.policy import Policy

logger = logging.getLogger(__name__)

FOLLOW_EVERY_S = 1.0
# An operator is told so soon that the store does not answer.
_ANSWER_S = 3.0


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The policy that plans, and the one that plans beside it for comparison."""

    policy: Policy = Policy.BREAKEVEN
    shadow: Policy | None = None


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator wants changed; what is left out stays as it is."""

    policy: Policy | msgspec.UnsetType = msgspec.UNSET
    shadow: Policy | msgspec.UnsetType | None = msgspec.UNSET

    def applied(self, order: Order) -> Order:
        policy = order.policy if self.policy is msgspec.UNSET else self.policy
        shadow = order.shadow if self.shadow is msgspec.UNSET else self.shadow
        return Order(policy, shadow)


class Orders(Protocol):
    """Where the order of a cluster lies; both raise OSError while it cannot be reached."""

    async def read(self) -> Order | None:
        """The order that was given last, if one was."""
        ...

    async def write(self, order: Order) -> None:
        """Put `order` in the place of the one before."""
        ...


class InForce:
    """The order that this ingress goes by."""

    def __init__(self, configured: Order, orders: Orders) -> None:
        self.configured, self._orders = configured, orders
        self._order, self._reached = configured, True
        # What is read must not take the place of what is being written.
        self._lock = asyncio.Lock()

    def order(self) -> Order:
        return self._order

    async def follow(self) -> None:
        """Look for orders until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(FOLLOW_EVERY_S)

    async def look(self) -> None:
        """Take the order that was given last; without one, or the store, nothing changes."""
        try:
            async with self._lock:
                self._take(await self._orders.read())
        except OSError as error:
            if self._reached:
                logger.warning("orders not read, %s stays in force: %s", self._order, error)
            self._reached = False
            return
        self._reached = True

    async def change(self, change: Change) -> Order:
        """Give an order, to every ingress: this one goes by it at once, the others within about
        `FOLLOW_EVERY_S`.

        Raises `OrderError` when the store does not take it, and then the last order stays.
        """
        try:
            # The store is read first: another ingress may have been given an order just now.
            async with asyncio.timeout(_ANSWER_S), self._lock:
                self._take(await self._orders.read())
                order = change.applied(self._order)
                await self._orders.write(order)
        except OSError as error:  # TimeoutError is one
            raise OrderError(str(error) or f"no answer within {_ANSWER_S:g} s") from error
        self._take(order)
        return order

    def _take(self, order: Order | None) -> None:
        if order is None or order == self._order:
            return
        logger.warning("policy in force: %s, shadow: %s", order.policy, order.shadow or "none")
        self._order = order
