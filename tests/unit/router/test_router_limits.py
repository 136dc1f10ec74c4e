"""Tenants' limits: the arithmetic for any history of requests, and the ledger's slots."""

import asyncio
import pickle
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.context import Notes
from router.errors import RateLimitError
from router.limits import (
    PERIOD_S,
    Account,
    Limits,
    LocalLedger,
    Standing,
    debited,
    duration,
    headers,
    judge,
    slot,
)

RATES = st.integers(1, 10**9)
# (seconds until the next request comes, tokens that it uses)
HISTORIES = st.lists(st.tuples(st.floats(0, 300), st.integers(0, 10**6)), max_size=40)
STARTS = st.floats(0, 1e7)


class Clock:
    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@given(STARTS, RATES, HISTORIES)
def test_nothing_enters_while_the_bucket_is_empty(
    start_s: float, rate: int, history: list[tuple[float, int]]
) -> None:
    """Whatever came before: who enters finds less used, since the start, than the bucket held
    and has gained; so the long-run rate is the limit, whatever single requests use."""
    limits, account, now_s, used = Limits(tokens_per_minute=rate), Account(), start_s, 0
    for after_s, tokens in history:
        now_s += after_s
        standing = judge(account, limits, now_s)
        if standing.refused is not None:
            assert standing.refused == "tokens"
            assert standing.left_tokens <= 0
            continue
        gained = rate * (now_s - start_s) / PERIOD_S
        assert used < rate + gained + 1e-6 * (rate + used)
        account = debited(account, limits, tokens, now_s)
        used += tokens


@given(STARTS, RATES, HISTORIES)
def test_the_bucket_never_holds_more_than_a_minute(
    start_s: float, rate: int, history: list[tuple[float, int]]
) -> None:
    """A tenant that was away for long gets a minute's tokens at once, and no more."""
    limits, account, now_s = Limits(tokens_per_minute=rate), Account(), start_s
    for after_s, tokens in history:
        now_s += after_s
        assert judge(account, limits, now_s).left_tokens <= rate
        account = debited(account, limits, tokens, now_s)


@given(STARTS, RATES, st.integers(0, 10**9), st.floats(0, 1e4))
def test_the_announced_wait_is_true(start_s: float, rate: int, tokens: int, after_s: float) -> None:
    """A refused request enters after retry_after_s, and one second less would not do."""
    limits = Limits(tokens_per_minute=rate)
    account, now_s = debited(Account(), limits, tokens, start_s), start_s + after_s
    standing = judge(account, limits, now_s)
    if standing.refused is None:
        assert standing.retry_after_s == 0
        return
    assert judge(account, limits, now_s + standing.retry_after_s).refused is None
    early_s = standing.retry_after_s - 1 - 0.01
    assert early_s < 0 or judge(account, limits, now_s + early_s).refused == "tokens"


@given(STARTS, RATES, st.integers(0, 10**9), st.floats(0, 1e4))
def test_the_announced_reset_is_true(
    start_s: float, rate: int, tokens: int, after_s: float
) -> None:
    """After full_in_s the bucket is full."""
    limits = Limits(tokens_per_minute=rate)
    account, now_s = debited(Account(), limits, tokens, start_s), start_s + after_s
    full_at_s = now_s + judge(account, limits, now_s).full_in_s + 1e-3
    assert judge(account, limits, full_at_s).left_tokens == rate


@given(st.integers(1, 100), st.integers(0, 200))
def test_requests_in_flight_are_at_most_the_limit(most: int, held: int) -> None:
    """Enters below the limit and counts itself; at the limit and above it is refused."""
    standing = judge(Account(held), Limits(max_requests=most), 0.0)
    assert (standing.refused is None) == (held < most)
    assert standing.in_flight == held + (held < most)


def test_an_empty_bucket_is_told_before_a_full_house() -> None:
    """With both, the longer wait is the true one."""
    limits = Limits(max_requests=1, tokens_per_minute=60)
    standing = judge(debited(Account(1), limits, 100, 0.0), limits, 0.0)
    assert (standing.refused, standing.retry_after_s) == ("tokens", 41)


def test_without_limits_everything_enters() -> None:
    """Either limit may be absent, and both."""
    assert judge(Account(10**6, 1e9), Limits(), 0.0).refused is None
    assert headers(judge(Account(10**6, 1e9), Limits(), 0.0)) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.017, "17ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (1.2, "1.2s"),
        (59.9991, "1m0s"),
        (360, "6m0s"),
        (3602.5, "1h0m2.5s"),
        (90000, "25h0m0s"),
    ],
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    """Rounded up: a client that waits so long does not come too early."""
    assert duration(seconds) == text


def test_headers_carry_openai_s_names() -> None:
    """Limit, what is left and when it is back, for each limit there is; never below zero."""
    limits = Limits(max_requests=8, tokens_per_minute=60000)
    account = debited(Account(2), limits, 1200, 0.0)
    assert dict(headers(judge(account, limits, 0.0))) == {
        b"x-ratelimit-limit-requests": b"8",
        b"x-ratelimit-remaining-requests": b"5",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"60000",
        b"x-ratelimit-remaining-tokens": b"58800",
        b"x-ratelimit-reset-tokens": b"1.2s",
    }
    overdrawn = judge(debited(account, limits, 90000, 0.0), limits, 0.0)
    assert dict(headers(overdrawn))[b"x-ratelimit-remaining-tokens"] == b"0"
    only = headers(judge(account, Limits(max_requests=1), 0.0))
    assert {name for name, _ in only} == {
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
    }


@pytest.mark.parametrize(
    ("standing", "says"),
    [
        (judge(Account(8), Limits(max_requests=8), 0.0), ["acme", "8 requests", "8 allowed"]),
        (
            judge(Account(0, 61.5), Limits(tokens_per_minute=600), 0.0),
            ["acme", "600 tokens a minute", "15 more", "try again in 2 s"],
        ),
    ],
)
def test_a_refusal_says_who_and_what(standing: Standing, says: list[str]) -> None:
    """Subject, numbers, remedy; and it survives a process boundary, like its data."""
    error = RateLimitError("acme", standing)
    assert all(part in str(error) for part in says)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(standing), type=Standing) == standing


async def test_a_slot_is_one_request_s() -> None:
    """Taken once, given back once: a second `leave`, or one without a slot, changes nothing."""
    ledger, limits = LocalLedger(Clock()), Limits(max_requests=2, tokens_per_minute=600)
    await ledger.enter("acme", limits, "a")
    await ledger.enter("acme", limits, "b")
    with pytest.raises(RateLimitError):
        await ledger.enter("acme", limits, "c")
    ledger.leave("acme", limits, "c", 500)
    with pytest.raises(RateLimitError):
        await ledger.enter("acme", limits, "c")
    for _ in range(2):
        ledger.leave("acme", limits, "a", 100)
    standing = await ledger.enter("acme", limits, "c")
    assert (standing.in_flight, standing.left_tokens) == (2, 500)


async def test_tenants_do_not_share_an_account() -> None:
    """One tenant's use leaves another's untouched."""
    ledger, limits = LocalLedger(Clock()), Limits(max_requests=1, tokens_per_minute=600)
    await ledger.enter("acme", limits, "a")
    ledger.leave("acme", limits, "a", 10_000)
    await ledger.enter("acme", Limits(max_requests=1), "b")
    standing = await ledger.enter("umbrella", limits, "a")
    assert (standing.in_flight, standing.left_tokens) == (1, 600)


async def test_changed_limits_keep_the_account() -> None:
    """A request that ends under new limits is debited by those it entered with; the wait that a
    tenant owes stays the same length."""
    clock = Clock()
    ledger, old, new = LocalLedger(clock), Limits(tokens_per_minute=60), Limits(tokens_per_minute=6)
    await ledger.enter("acme", old, "a")
    ledger.leave("acme", old, "a", 90)
    with pytest.raises(RateLimitError) as caught:
        await ledger.enter("acme", new, "b")
    assert caught.value.standing.retry_after_s == 31


class SlowLedger:
    """A local ledger at a distance: `enter` takes hold at once, and answers a second later."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.books = LocalLedger(now)

    async def enter(self, tenant: str, limits: Limits, request_id: str) -> Standing:
        standing = await self.books.enter(tenant, limits, request_id)
        await asyncio.sleep(1.0)
        return standing

    def leave(self, tenant: str, limits: Limits, request_id: str, tokens: int) -> None:
        self.books.leave(tenant, limits, request_id, tokens)


@pytest.mark.looptime(start=0, idle_timeout=0)
@pytest.mark.parametrize(
    ("after_s", "left_tokens"), [(0.0, 60), (0.5, 60), (1.0, 60), (1.5, 30), (3.0, 31)]
)
async def test_no_moment_of_cancellation_leaks_a_slot(after_s: float, left_tokens: int) -> None:
    """A request that is cancelled before, while or after it enters gives its slot back, and is
    debited what it used so far."""
    now = asyncio.get_running_loop().time
    ledger, limits, notes = SlowLedger(now), Limits(max_requests=1, tokens_per_minute=60), Notes()

    async def request() -> None:
        async with slot(ledger, "acme", limits, notes):
            notes.used_tokens += 30
            await asyncio.sleep(1.0)

    task = asyncio.create_task(request())
    await asyncio.sleep(after_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    standing = await ledger.enter("acme", limits, "next")
    assert (standing.in_flight, standing.left_tokens) == (1, left_tokens)
