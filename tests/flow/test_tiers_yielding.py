"""Blocks of requests that yield take nobody's place in the tiers. vLLM's manager over real memory
and files, without an engine; a model of the host tier says what may go."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus

from kv import offload_disk
from kv.keep import KEEP
from kv.offload_disk import DiskTier
from kv.offload_host import HostTier
from kv.offload_policy import YieldingFirst
from kv.offload_tiers import Tiers
from tests.flow.host_region import host_region
from workers.messages import Keep
from workers.tiers import keep_of, with_hints

PAGE, ROWS = 4096, 4
KEYS = [make_offload_key(bytes([at + 1]) * 32, 0) for at in range(12)]


class _Stack:
    """A host tier of four blocks and a disk behind it."""

    def __init__(self, folder: Path) -> None:
        primary = HostTier(ROWS, host_region(ROWS, PAGE))
        spec: Any = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True))
        self.disk = DiskTier(
            spec, primary.get_kv_memoryview(), "DiskTier", str(folder), 1 << 20, "model"
        )
        self.tiers = Tiers(primary, [self.disk])
        self._names = map(str, range(1000))

    def request(self, yields: bool) -> ReqContext:
        context = ReqContext(next(self._names), with_hints(None, "t", keep=Keep(yields=yields)))
        self.tiers.on_new_request(context)
        return context

    def store(self, keys: list[Any], yields: bool) -> list[Any]:
        """The blocks of one request; those among them that are stored."""
        context = self.request(yields)
        output = self.tiers.prepare_store(keys, context)
        stored = [] if output is None else list(output.keys_to_store)
        if stored:
            self.tiers.complete_store(stored, context)
        self.tiers.on_request_finished(context)
        self.settle()
        return stored

    def settle(self) -> None:
        for _ in range(3):
            self.disk.drain_jobs()
            self.tiers.on_schedule_end(ScheduleEndContext((), ()))

    def held(self) -> set[Any]:
        found = (self.tiers.primary_tier.lookup(key, ReqContext("looks")) for key in KEYS)
        return {key for key, each in zip(KEYS, found, strict=True) if each is LookupResult.HIT}

    def files(self) -> int:
        return len(self.disk.store.held())


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Stack]:
    monkeypatch.setattr(offload_disk, "layout_of", lambda *_: "f")
    stack = _Stack(tmp_path)
    yield stack
    stack.tiers.shutdown()


def test_free_room_is_used_and_nothing_else(stack: _Stack) -> None:
    """Two of four rows are taken: a yielding request stores its first two blocks, and none of the
    others later, which nobody would find."""
    stack.store(KEYS[:2], yields=False)
    assert stack.store(KEYS[2:6], yields=True) == KEYS[2:4]
    assert stack.held() == set(KEYS[:4])
    assert stack.store(KEYS[6:8], yields=True) == KEYS[6:8]  # in place of those of its kind
    assert stack.held() == {*KEYS[:2], *KEYS[6:8]}


def test_a_full_tier_of_urgent_blocks_stays_as_it_is(stack: _Stack) -> None:
    """Whatever yielding requests come."""
    stack.store(KEYS[:4], yields=False)
    for at in range(4, 10, 2):
        assert stack.store(KEYS[at : at + 2], yields=True) == []
    assert stack.held() == set(KEYS[:4])


def test_yielding_blocks_go_before_older_ones(stack: _Stack) -> None:
    """An urgent request that needs two rows takes those of the yielding request, though the other
    blocks are older."""
    stack.store(KEYS[:2], yields=False)
    stack.store(KEYS[2:4], yields=True)
    assert stack.store(KEYS[4:6], yields=False) == KEYS[4:6]
    assert stack.held() == {*KEYS[:2], *KEYS[4:6]}


def test_a_block_that_somebody_else_uses_stays(stack: _Stack) -> None:
    """A yielding request's block becomes like any other once an urgent request stores it too, or
    finds it; one that another yielding request finds does not."""
    stack.store(KEYS[:3], yields=True)
    stack.store(KEYS[:1], yields=False)
    stack.tiers.lookup(KEYS[1], stack.request(yields=False))
    stack.tiers.lookup(KEYS[2], stack.request(yields=True))
    stack.store(KEYS[4:6], yields=False)
    assert stack.held() == {*KEYS[:2], *KEYS[4:6]}


def test_nothing_of_it_goes_further_than_the_host_tier(stack: _Stack) -> None:
    """A disk keeps other blocks for so much longer."""
    stack.store(KEYS[:2], yields=True)
    assert stack.files() == 0
    stack.store(KEYS[2:4], yields=False)
    assert stack.files() == 2


def test_what_lies_on_disk_is_fetched_into_free_room_only(stack: _Stack) -> None:
    """With every row taken by urgent blocks, a yielding request computes what an urgent one would
    fetch."""
    stack.store(KEYS[:4], yields=False)
    stack.store(KEYS[4:8], yields=False)
    asks = stack.request(yields=True)
    assert stack.tiers.lookup(KEYS[0], asks) is LookupResult.MISS
    assert stack.held() == set(KEYS[4:8])
    asks = stack.request(yields=False)
    assert stack.tiers.lookup(KEYS[0], asks) is LookupResult.HIT_PENDING
    stack.settle()
    assert stack.tiers.lookup(KEYS[0], asks) is LookupResult.HIT


def test_keep_says_who_yields() -> None:
    """The message's field arrives where the tiers look for it."""
    for yields in (True, False):
        params = with_hints(None, "t", keep=Keep(yields=yields))
        assert params[KEEP]["yields"] is yields
        assert keep_of(params) == Keep(yields=yields)


OPS = st.lists(
    st.tuples(
        st.sampled_from(["store", "pin", "unpin", "touch", "remove"]),
        st.integers(0, 7),
        st.booleans(),
    ),
    max_size=60,
)


@given(ops=OPS)
def test_a_block_that_stays_goes_only_when_no_yielding_one_could(
    ops: list[tuple[str, int, bool]],
) -> None:
    """Any sequence of stores, loads, uses and removals over four rows: a model knows which blocks
    yield; the policy holds the same blocks, and evicts yielding ones first."""
    policy, model, pinned = YieldingFirst(ROWS), {}, set()
    for op, at, yields in ops:
        key = KEYS[at]
        context = ReqContext("r", {KEEP: {"yields": yields}})
        if op == "store" and key not in model:
            if len(model) == ROWS:
                idle = [k for k in model if k not in pinned]
                spare = [k for k in idle if model[k]]
                gone = policy.evict(1, set())
                assert (gone is None) == (not idle)
                if gone is None:
                    continue
                [(name, _)] = gone
                assert model.pop(name) or not spare
            policy.on_store_miss([key], context)
            chunk = ChunkStatus(len(model))
            policy.insert(key, chunk)
            chunk.ref_cnt = 0
            policy.mark_evictable(key)
            model[key] = yields
        elif op == "pin" and key in model and key not in pinned:
            policy.mark_non_evictable(key)
            policy.get(key).ref_cnt = 1  # type: ignore[union-attr]
            pinned.add(key)
        elif op == "unpin" and key in pinned:
            policy.get(key).ref_cnt = 0  # type: ignore[union-attr]
            policy.mark_evictable(key)
            pinned.discard(key)
        elif op == "touch" and key in model:
            policy.touch([key], context)
            model[key] = model[key] and yields
        elif op == "remove" and key in model and key not in pinned:
            policy.remove(key)
            del model[key]
        assert {k for k in KEYS if policy.get(k) is not None} == model.keys()
        spare = sum(each for k, each in model.items() if k not in pinned)
        assert policy.idle_yielding() == spare
    assert not getattr(YieldingFirst, "__abstractmethods__", frozenset())
    assert issubclass(YieldingFirst, CachePolicy)
