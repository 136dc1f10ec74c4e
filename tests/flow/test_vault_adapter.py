"""The vault as a tier of vLLM's manager: real memory and a real shard, without an engine."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key

from kv.curve import PrefillCurve
from kv.offload_host import HostTier
from kv.offload_tiers import Tiers
from kv.promoted import DEADLINE
from tests.flow.host_region import host_region
from tests.vault.shard_process import SECRET, ShardHandle, client, shard
from tests.waiting import await_that
from workers import connector
from workers.vault import tier as tier_module
from workers.vault.keys import client_keys
from workers.vault.pages import FORMAT
from workers.vault.tier import ASK_S, VaultTier

PAGE, ROWS, TOKENS = 4096, 32, 16
KEYS = [make_offload_key(bytes([at + 1]) * 32, 0) for at in range(ROWS)]


class _Stack:
    """Host tier and vault, and the steps that an engine would make."""

    def __init__(self, address: str) -> None:
        primary = HostTier(ROWS, host_region(ROWS, PAGE))
        group = SimpleNamespace(group_id=0, tokens_per_block=TOKENS, layer_names=["a"])
        spec: Any = SimpleNamespace(config=SimpleNamespace(groups=[group]))
        self.view = primary.get_kv_memoryview()
        self.vault = VaultTier(spec, self.view, "VaultTier", "model", 1, None)
        self.vault.attach(client_keys(SECRET), PrefillCurve(0.1, 1e-3, 1e-6))
        self.vault.seat({"vault-0": address})
        assert self.vault.await_up(20.0)
        self.tiers = Tiers(primary, [self.vault])

    def request(self, name: str, blocks: int, tag: str = "aa") -> ReqContext:
        """One with so many blocks."""
        context = ReqContext(name, {"tag": tag})
        for at, key in enumerate(KEYS[:blocks]):
            context.set_offload_key_position(key, (at + 1) * TOKENS)
        self.tiers.on_new_request(context)
        return context

    def store(self, context: ReqContext, keys: list[Any]) -> None:
        """Blocks that were computed, each of bytes of its own."""
        output: Any = self.tiers.prepare_store(keys, context)
        for key, row in zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True):
            self.row(row)[:] = key[:1] * PAGE
        self.tiers.complete_store(set(output.keys_to_store), context)

    def row(self, row: int) -> memoryview:
        view: memoryview = self.view[row : row + 1].cast("B")
        return view

    def step(self) -> None:
        self.tiers.on_schedule_end(ScheduleEndContext((), ()))

    def settle(self) -> None:
        """Step until nothing is on its way; nothing is held then."""

        def idle() -> bool:
            self.step()
            return not self.tiers.has_pending_work()

        await_that(idle, "nothing is on its way", 20.0)
        primary = self.tiers.primary_tier
        held = primary._num_allocated_chunks - len(primary._free_list)
        assert held == primary._num_evictable_cache_chunks
        assert not self.vault._storing

    def found(self, context: ReqContext, keys: list[Any]) -> list[LookupResult]:
        """What lookups say once they say more than "later"."""
        results: list[LookupResult] = []

        def decided() -> bool:
            results[:] = [self.tiers.lookup(key, context) for key in keys]
            self.step()
            pending = (LookupResult.RETRY, LookupResult.HIT_PENDING)
            return not any(result in pending for result in results)

        await_that(decided, "lookups are decided", 20.0)
        return results


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardHandle]:
    monkeypatch.setattr(tier_module, "layout_of", lambda *_: "ab" * 12)
    connector.keep_on_network("127.0.0.1")
    with shard(tmp_path, fingerprint=FORMAT) as handle:
        yield handle


@pytest.fixture
def stack(running: ShardHandle) -> Iterator[Callable[[], _Stack]]:
    """Replicas of one vault."""
    made: list[_Stack] = []

    def another() -> _Stack:
        made.append(_Stack(running.seat.address or ""))
        return made[-1]

    yield another
    for each in made:
        each.tiers.shutdown()


def test_blocks_cross_from_one_replica_to_another(stack: Callable[[], _Stack]) -> None:
    """They are a hit in the other's host memory, with the bytes that they had; what nobody has
    stored is a miss."""
    one, other = stack(), stack()
    one.store(one.request("a", 20), KEYS[:12])
    one.settle()
    reader = other.request("b", 20)
    assert other.tiers.lookup(KEYS[0], reader) is LookupResult.RETRY
    results = other.found(reader, KEYS[:20])
    assert results == [LookupResult.HIT] * 12 + [LookupResult.MISS] * 8
    spec: Any = other.tiers.prepare_load(KEYS[:12], reader)
    rows = [bytes(other.row(row)) for row in spec.chunk_ids.tolist()]
    assert rows == [key[:1] * PAGE for key in KEYS[:12]]
    other.tiers.complete_load(KEYS[:12], reader)
    other.settle()


@pytest.mark.parametrize("coming", [4, 2, 0])
def test_a_load_tells_what_all_that_was_asked_for_took_at_least(
    stack: Callable[[], _Stack], monkeypatch: pytest.MonkeyPatch, coming: int
) -> None:
    """However much of it came: a link that stalls behind the first block brings none sooner than
    one that stalls before it."""
    one, other = stack(), stack()
    one.store(one.request("a", 8), KEYS[:4])
    one.settle()
    reading = other.vault._vault._reading  # type: ignore[union-attr]
    get = reading.get
    monkeypatch.setattr(reading, "get", lambda run, keys, *rest: get(run, keys[:coming], *rest))
    other.found(other.request("b", 8), KEYS[:8])
    other.settle()
    ((lossy, n_bytes, seconds),) = other.vault.loads()
    assert (lossy, n_bytes) == (False, 4 * PAGE)
    assert 0.0 < seconds < 5.0
    assert not other.vault.loads()


def test_a_lookup_never_waits(stack: Callable[[], _Stack], running: ShardHandle) -> None:
    """A shard that hangs is asked in the background: "later" until the deadline, then a miss for
    good, and each answer at once."""
    one = stack()
    running.send(signal.SIGSTOP)
    context, begun, longest_s = one.request("a", 20), time.monotonic(), 0.0
    while True:
        asked = time.monotonic()
        result = one.tiers.lookup(KEYS[0], context)
        longest_s = max(longest_s, time.monotonic() - asked)
        one.step()
        if result is not LookupResult.RETRY:
            break
        time.sleep(0.005)
    assert result is LookupResult.MISS
    assert ASK_S <= time.monotonic() - begun < ASK_S + 2.0
    assert longest_s < ASK_S
    assert one.tiers.lookup(KEYS[1], context) is LookupResult.MISS
    running.send(signal.SIGCONT)


def test_a_prompt_is_not_searched_while_it_waits(
    stack: Callable[[], _Stack], running: ShardHandle
) -> None:
    """In each step the first block looked up says "later", and a miss behind it ends the search;
    whichever is the first, since blocks before it may have come by other ways."""
    one = stack()
    running.send(signal.SIGSTOP)
    context = one.request("a", 20)
    for first in (0, 0, 3):
        results = [one.tiers.lookup(key, context) for key in KEYS[first:20]]
        assert results == [LookupResult.RETRY] + [LookupResult.MISS] * (19 - first)
        one.step()
    running.send(signal.SIGCONT)


def test_a_vault_that_does_not_keep_up_is_not_waited_for(
    stack: Callable[[], _Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the host tier may wait to be stored, the rest is free for what comes."""
    one, go = stack(), threading.Event()
    store = one.vault._vault.store  # type: ignore[union-attr]

    def late(*arguments: Any) -> Any:
        go.wait(30)
        return store(*arguments)

    monkeypatch.setattr(one.vault._vault, "store", late)
    context = one.request("a", ROWS)
    for at in range(0, 24, 4):
        one.store(context, KEYS[at : at + 4])
    one.step()
    assert sum(one.vault._storing.values()) == ROWS // 4
    go.set()
    one.settle()
    other = stack()
    held = other.found(other.request("b", ROWS), KEYS[:24])
    assert held == [LookupResult.HIT] * 8 + [LookupResult.MISS] * 16


def test_what_waits_to_be_stored_is_not_once_its_tenant_is_erased(
    stack: Callable[[], _Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever ordered it hears of the end once the vault has erased what was there."""
    one, go, told = stack(), threading.Event(), threading.Event()
    store = one.vault._vault.store  # type: ignore[union-attr]

    def late(*arguments: Any) -> Any:
        go.wait(30)
        return store(*arguments)

    mine, others = one.request("a", 8, "aa"), one.request("b", 8, "bb")
    one.store(mine, KEYS[:2])
    one.settle()
    monkeypatch.setattr(one.vault._vault, "store", late)
    one.store(others, KEYS[4:6])  # under way when the order comes
    one.store(mine, KEYS[2:4])
    one.tiers.erase({"aa"})
    one.vault.forgotten(told.set)
    assert not told.wait(0.2)
    go.set()
    assert told.wait(10)
    one.settle()
    other = stack()
    expected = [LookupResult.MISS] * 4 + [LookupResult.HIT] * 2
    assert other.found(other.request("c", 8), KEYS[:6]) == expected


def test_what_the_vault_has_is_told(stack: Callable[[], _Stack], running: ShardHandle) -> None:
    """By who stored it, by who found it, until it is erased, or is found to be gone."""

    def told(one: _Stack) -> list[tuple[set[Any], bool]]:
        return [(set(event.keys), event.removed) for event in one.vault.take_events()]

    one, other = stack(), stack()
    one.store(one.request("a", 8, "aa"), KEYS[:3])
    one.settle()
    assert told(one) == [(set(KEYS[:3]), False)]
    other.found(other.request("b", 8, "aa"), KEYS[:8])
    other.settle()
    assert told(other) == [(set(KEYS[:3]), False)]
    one.tiers.erase({"aa"})
    one.settle()
    assert told(one) == [(set(KEYS[:3]), True)]
    with client(running, fingerprint=FORMAT) as vault:
        await_that(lambda: vault.stats(5.0)["vault-0"].blocks == 0, "it is erased", 10.0)  # type: ignore[union-attr]
    # It has them in host memory; who has not asks again.
    other.tiers.reset_cache()
    other.found(other.request("c", 8, "aa"), KEYS[:8])
    assert told(other) == [(set(KEYS[:3]), True)]


def test_an_erasure_that_a_shard_does_not_confirm_is_not_told(
    stack: Callable[[], _Stack], running: ShardHandle
) -> None:
    """Whoever ordered it has to order again."""
    one, told = stack(), threading.Event()
    running.send(signal.SIGKILL)
    one.tiers.erase({"aa"})
    one.vault.forgotten(told.set)
    assert not told.wait(1.0)
    running.start()
    one.vault.seat({"vault-0": running.seat.address or ""})
    assert one.vault.await_up(10.0)
    one.tiers.erase({"aa"})
    one.vault.forgotten(told.set)
    assert told.wait(10.0)


def test_what_came_of_a_late_load_is_used(
    stack: Callable[[], _Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that waits no longer takes the blocks that are there and computes the rest; nobody
    loads or counts one twice, and those that come later are there for the next."""
    one = stack()
    one.store(one.request("a", 8), KEYS[:8])
    one.settle()
    other, go = stack(), threading.Event()
    take = other.vault._vault._take  # type: ignore[union-attr]

    def stuck(*arguments: Any) -> None:
        if arguments[-2].endswith(KEYS[3]):
            go.wait(30)
        take(*arguments)

    monkeypatch.setattr(other.vault._vault, "_take", stuck)
    late = other.request("b", 8)
    late.kv_transfer_params = {"tag": "aa", DEADLINE: 0.5}
    assert other.found(late, KEYS[:8]) == [LookupResult.HIT] * 3 + [LookupResult.MISS] * 5
    spec = other.tiers.prepare_load(KEYS[:3], late)
    for key, row in zip(KEYS[:3], spec.chunk_ids, strict=True):  # type: ignore[attr-defined]
        assert bytes(other.row(row)) == key[:1] * PAGE
    other.tiers.complete_load(KEYS[:3], late)
    go.set()
    other.settle()
    assert other.found(other.request("c", 8), KEYS[:8]) == [LookupResult.HIT] * 8
    assert not other.tiers._arrived
