"""Loans of the host tier's blocks against the stores, evictions and resets that go on beside."""

import random
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager

from kv.loan import Loan
from kv.offload_host import HostTier
from tests.flow.host_region import host_region

CHUNKS, PAGE = 8, 4096
KEYS = [make_offload_key(b"%032d" % n, 0) for n in range(12)]


def host() -> HostTier:
    return HostTier(CHUNKS, host_region(CHUNKS, PAGE))


def store(tier: HostTier, key: Any, name: str = "r") -> bool:
    output = tier.prepare_store([key], ReqContext(name))
    if output is not None:
        tier.complete_store(output.keys_to_store, ReqContext(name))
    return output is not None


def evictable(tier: HostTier) -> int:
    return sum(chunk.ref_cnt == 0 for chunk in tier._policy.chunks.values())


def test_what_is_lent_stays_where_it_is() -> None:
    """However much is stored meanwhile; given back, it goes as anything else does."""
    tier = host()
    store(tier, KEYS[0])
    loan = tier.lend([KEYS[0], KEYS[1]])
    [row, missing] = loan.rows
    assert missing is None
    for key in KEYS[1:]:
        assert store(tier, key)
    assert tier.lend([KEYS[0]]).rows == (row,)
    tier.give_back(loan)
    tier.give_back(loan.__class__((row,), loan.chunks))
    for key in KEYS[1:] * 2:
        store(tier, key)
    assert tier.here([KEYS[0]]) == (False,)


def test_half_of_the_tier_is_lent_at_most() -> None:
    """So that readers cannot keep the engine from storing."""
    tier = host()
    for key in KEYS[:CHUNKS]:
        store(tier, key)
    loan = tier.lend(KEYS[:CHUNKS])
    assert sum(row is not None for row in loan.rows) == tier.lent == CHUNKS // 2
    assert store(tier, KEYS[CHUNKS])


def test_what_is_being_written_or_withheld_is_not_lent() -> None:
    """A block that is not whole yet, and one that is being erased."""
    tier = host()
    tier.prepare_store([KEYS[0]], ReqContext("r"))
    store(tier, KEYS[1])
    tier.withheld = lambda key: key == KEYS[1]
    assert tier.here(KEYS[:2]) == (False, False)
    assert tier.lend(KEYS[:2]).rows == (None, None)


def test_a_reset_ends_no_book_twice() -> None:
    """A loan from before does not unpin what was stored under its name since."""
    tier = host()
    store(tier, KEYS[0])
    old = tier.lend([KEYS[0]])
    tier.reset_cache()
    store(tier, KEYS[0])
    new = tier.lend([KEYS[0]])
    tier.give_back(old)
    assert evictable(tier) == tier._num_evictable_cache_chunks == 0
    tier.give_back(new)
    assert evictable(tier) == tier._num_evictable_cache_chunks == 1
    assert tier.lent == 0


@given(st.lists(st.tuples(st.sampled_from("sslgr"), st.integers(0, 11)), max_size=60))
@settings(deadline=None, max_examples=60)
def test_the_books_balance_whatever_happens(events: list[tuple[str, int]]) -> None:
    """Stores, loans, ends of loans and resets in any order: counts are those of the chunks, and a
    lent row is nobody else's."""
    tier = _tiers[0]
    tier.reset_cache()
    loans: list[Loan] = []
    for event, n in events:
        if event == "s":
            store(tier, KEYS[n])
        elif event == "l":
            loans.append(tier.lend([KEYS[n], KEYS[(n + 1) % 12]]))
        elif event == "g" and loans:
            tier.give_back(loans.pop(n % len(loans)))
        elif event == "r" and not loans:
            tier.reset_cache()
        rows = {row for loan in loans for row in loan.rows if row is not None}
        pinned = {c.chunk_id for c in tier._policy.chunks.values() if c.ref_cnt > 0}
        assert rows == pinned
        assert evictable(tier) == tier._num_evictable_cache_chunks
    for loan in loans:
        tier.give_back(loan)
    assert tier.lent == 0
    assert evictable(tier) == len(tier._policy.chunks)


@pytest.fixture(scope="module", autouse=True)
def _one_tier() -> Any:
    _tiers.append(host())
    yield
    _tiers.clear()


_tiers: list[HostTier] = []


def test_threads_that_lend_harm_no_store() -> None:
    """Loans from two threads beside stores that evict all the time."""
    tier, ended, failures = host(), threading.Event(), []

    def borrow(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not ended.is_set():
                loan = tier.lend(rng.sample(KEYS, 3))
                tier.here(KEYS)
                tier.give_back(loan)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=borrow, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    rng = random.Random(5)
    for _ in range(3000):
        key = rng.choice(KEYS)
        store(tier, key)
        if tier.lookup(key, ReqContext("r")) is LookupResult.HIT:
            tier.touch([key], ReqContext("r"))
    ended.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert tier.lent == 0
    assert evictable(tier) == tier._num_evictable_cache_chunks == len(tier._policy.chunks)


def test_every_change_of_the_books_takes_the_lock() -> None:
    """A method that upstream adds to the books of its host tier is seen here."""
    reads = {"lookup", "get_load_source", "get_stats", "get_kv_memoryview", "shutdown"}
    # Of the engine's thread alone: requests' own records, and events.
    own = {"on_new_request", "take_events", "prepare_load", "prepare_read"}
    public = {
        name
        for kind in (CPUPrimaryTierOffloadingManager, *CPUPrimaryTierOffloadingManager.__mro__[1:2])
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("_")
    }
    locked = {name for name in vars(HostTier) if not name.startswith("_")}
    assert public - reads - own <= locked
