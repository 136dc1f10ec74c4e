"""How much one tenant may ask for: requests in flight, and tokens a minute.

The token rate is a bucket that holds a minute's tokens and fills all the time. A request enters
while the bucket is not empty, and what it used is taken out when it ends; an overdraft is repaid by
waiting. The bucket is kept as one number, the time at which it is full again: virtual scheduling,
as ITU-T I.371 defines it for the generic cell rate algorithm.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from math import ceil, floor
from typing import Annotated, Literal, Protocol
from uuid import uuid4

import msgspec
from msgspec import Meta

from router.context import Notes
from router.errors import RateLimitError

# A bucket's capacity is what it gains in this time.
PERIOD_S = 60.0
# Requests in flight end at times nobody knows; this is when asking again is cheap enough.
ASK_AGAIN_S = 1
# Clocks are floats; a wait that is announced is longer than any error of theirs.
_CLOCK_ERROR_S = 1e-3

AtLeastOne = Annotated[int, Meta(ge=1)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the key file allows one tenant; None allows any number."""

    max_requests: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None


class Account(msgspec.Struct, frozen=True):
    """What is held against one tenant: requests in flight, and when its bucket is full again,
    in seconds of the ledger's clock."""

    in_flight: int = 0
    full_at_s: float = 0.0


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tenant stands once a request has entered, or was refused for `refused`.

    `left_tokens` is negative when overdrawn; a refused request enters after `retry_after_s` unless
    others came first. Without a token limit both token figures are zero.
    """

    limits: Limits
    in_flight: int
    left_tokens: int = 0
    full_in_s: float = 0.0
    refused: Literal["requests", "tokens"] | None = None
    retry_after_s: int = 0


def judge(account: Account, limits: Limits, now_s: float) -> Standing:
    """Whether one more request of the tenant may enter now. An empty bucket is told before a full
    house, since it takes longer."""
    debt_s = max(0.0, account.full_at_s - now_s) if limits.tokens_per_minute else 0.0
    empty = debt_s >= PERIOD_S
    full = limits.max_requests is not None and account.in_flight >= limits.max_requests
    standing = Standing(
        limits=limits,
        in_flight=account.in_flight,
        left_tokens=_left_tokens(limits, debt_s),
        full_in_s=debt_s,
    )
    if empty:
        wait_s = floor(debt_s - PERIOD_S + _CLOCK_ERROR_S) + 1
        return msgspec.structs.replace(standing, refused="tokens", retry_after_s=wait_s)
    if full:
        return msgspec.structs.replace(standing, refused="requests", retry_after_s=ASK_AGAIN_S)
    return msgspec.structs.replace(standing, in_flight=account.in_flight + 1)


def debited(account: Account, limits: Limits, tokens: int, now_s: float) -> Account:
    """The account once `tokens` were used; without a token limit they cost nothing."""
    if limits.tokens_per_minute is None:
        return account
    cost_s = tokens * PERIOD_S / limits.tokens_per_minute
    full_at_s = max(account.full_at_s, now_s) + cost_s
    return msgspec.structs.replace(account, full_at_s=full_at_s)


def _left_tokens(limits: Limits, debt_s: float) -> int:
    if limits.tokens_per_minute is None:
        return 0
    # Rounded first: one token short for a float's sake would read as a token used.
    return floor(round(limits.tokens_per_minute * (1 - debt_s / PERIOD_S), 6))


def headers(standing: Standing) -> list[tuple[bytes, bytes]]:
    """OpenAI's response headers, for the limits that the tenant has. `reset-tokens` is when the
    bucket is full again; `reset-requests` when asking again makes sense."""
    figures: list[tuple[str, int, int, str]] = []
    if (most := standing.limits.max_requests) is not None:
        reset = duration(ASK_AGAIN_S if standing.in_flight else 0)
        figures.append(("requests", most, most - standing.in_flight, reset))
    if (most := standing.limits.tokens_per_minute) is not None:
        figures.append(("tokens", most, standing.left_tokens, duration(standing.full_in_s)))
    return [
        (f"x-ratelimit-{name}-{unit}".encode(), str(value).encode())
        for unit, limit, remaining, reset in figures
        for name, value in (("limit", limit), ("remaining", max(0, remaining)), ("reset", reset))
    ]


def duration(seconds: float) -> str:
    """A time as OpenAI writes it, rounded up to milliseconds: `17ms`, `1.2s`, `6m0s`."""
    total_ms = ceil(round(seconds * 1000, 3))
    if 0 < total_ms < 1000:
        return f"{total_ms}ms"
    minutes, rest_ms = divmod(total_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    longer = (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "")
    return f"{longer}{rest_ms / 1000:g}s"


class Ledger(Protocol):
    """Who keeps the accounts. `request_id` is one that nobody else uses, whatever clients send."""

    async def enter(self, tenant: str, limits: Limits, request_id: str) -> Standing:
        """Take a slot for the request; raises `RateLimitError`, and then holds none."""
        ...

    def leave(self, tenant: str, limits: Limits, request_id: str, tokens: int) -> None:
        """Give the slot back and debit what was used. Follows every `enter`, also one that was
        refused or cancelled; without a slot it changes nothing."""
        ...


class LocalLedger:
    """Accounts of this process. Nothing waits here, so that no cancellation comes between."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._slots: dict[str, set[str]] = {}
        self._full_at_s: dict[str, float] = {}

    async def enter(self, tenant: str, limits: Limits, request_id: str) -> Standing:
        """See `Ledger`."""
        standing = self.take(tenant, limits, request_id)
        if standing.refused is not None:
            raise RateLimitError(tenant, standing)
        return standing

    def take(self, tenant: str, limits: Limits, request_id: str) -> Standing:
        """A slot, unless the standing that is returned says refused."""
        standing = judge(self._account(tenant), limits, self._now())
        if standing.refused is None:
            self.hold(tenant, request_id)
        return standing

    def hold(self, tenant: str, request_id: str) -> None:
        """Count a request in flight whose entering was decided elsewhere."""
        self._slots.setdefault(tenant, set()).add(request_id)

    def leave(self, tenant: str, limits: Limits, request_id: str, tokens: int) -> None:
        """See `Ledger`."""
        slots = self._slots.get(tenant, set())
        if request_id not in slots:
            return
        slots.remove(request_id)
        account = debited(self._account(tenant), limits, tokens, self._now())
        self._full_at_s[tenant] = account.full_at_s

    def _account(self, tenant: str) -> Account:
        in_flight = len(self._slots.get(tenant, ()))
        return Account(in_flight, self._full_at_s.get(tenant, 0.0))


@asynccontextmanager
async def slot(
    ledger: Ledger, tenant: str, limits: Limits, notes: Notes
) -> AsyncIterator[Standing]:
    """A slot for the length of a request; `notes` says at its end what it used."""
    request_id = uuid4().hex
    try:
        yield await ledger.enter(tenant, limits, request_id)
    finally:
        ledger.leave(tenant, limits, request_id, notes.used_tokens)
