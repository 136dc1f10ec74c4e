"""What `forget` leaves of blocks that are on their way between tiers: nothing. What a slow disk
holds up: neither steps nor requests. vLLM's manager over real memory and files, without an
engine."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key

from kv import offload_disk
from kv.errors import DiskError
from kv.offload_disk import DiskTier
from kv.offload_host import HostTier
from kv.offload_tiers import Tiers
from tests.flow.host_region import host_region

PAGE = 4096
MINE, OTHER = (make_offload_key(name * 32, 0) for name in (b"m", b"o"))


class _Stack:
    """Host and disk tier, and the steps that an engine would make."""

    def __init__(self, folder: Path) -> None:
        primary = HostTier(8, host_region(8, PAGE))
        spec: Any = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True))
        view = primary.get_kv_memoryview()
        self.disk = DiskTier(spec, view, "DiskTier", str(folder), 1 << 20, "model")
        self.now_s = 0.0
        self.tiers = Tiers(primary, [self.disk], 5.0, lambda: self.now_s)
        self.folder, self.view = folder, view

    def request(self, name: str, tag: str, **hints: float) -> ReqContext:
        context = ReqContext(name, {"tag": tag, **hints})
        self.tiers.on_new_request(context)
        return context

    def store(self, key: Any, context: ReqContext) -> None:
        self.copy(key, context)
        self.tiers.complete_store({key}, context)

    def copy(self, key: Any, context: ReqContext) -> None:
        """Begin to copy a block into the host tier; `complete_store` ends it."""
        output: Any = self.tiers.prepare_store([key], context)
        [row] = output.store_spec.chunk_ids.tolist()
        self.view[row : row + 1].cast("B")[:] = b"x" * PAGE

    def settle(self) -> None:
        """Step until nothing is on its way."""
        for _ in range(3):
            self.disk.drain_jobs()
            self.tiers.on_schedule_end(ScheduleEndContext((), ()))
        assert not self.tiers.has_pending_work()

    def files(self) -> int:
        return len(list(self.folder.rglob("*.kv")))

    def host(self, key: Any) -> LookupResult:
        return self.tiers.primary_tier.lookup(key, ReqContext("looks"))


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Stack]:
    monkeypatch.setattr(offload_disk, "layout_of", lambda *_: "f")
    stack = _Stack(tmp_path)
    yield stack
    stack.tiers.shutdown()


def test_what_is_copied_to_host_memory_gets_no_further(stack: _Stack) -> None:
    """Erased before its copy is done, a block is removed and overwritten instead of being stored
    on disk; another tenant's goes its way."""
    mine, other = stack.request("a", "aa"), stack.request("b", "bb")
    stack.copy(MINE, mine)
    stack.copy(OTHER, other)
    stack.tiers.erase({"aa"})
    stack.tiers.complete_store({MINE}, mine)
    stack.tiers.complete_store({OTHER}, other)
    stack.settle()
    assert stack.host(MINE) is LookupResult.MISS
    assert stack.host(OTHER) is LookupResult.HIT
    assert stack.files() == 1
    assert bytes(stack.view.cast("B")).count(b"x") == PAGE


def test_what_waits_for_the_disk_is_not_stored(
    stack: _Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that the disk tier has and has not begun when the order comes."""
    erased, put = threading.Event(), stack.disk.store.put

    def late(*arguments: Any) -> bool:
        erased.wait(30)
        return put(*arguments)

    monkeypatch.setattr(stack.disk.store, "put", late)
    mine, other = stack.request("a", "aa"), stack.request("b", "bb")
    for key, context in ((MINE, mine), (OTHER, other)):
        stack.copy(key, context)
        stack.tiers.complete_store({key}, context)
    stack.tiers.erase({"aa"})
    erased.set()
    stack.settle()
    assert stack.files() == 1
    assert stack.disk.store.has("bb", OTHER)
    assert stack.host(MINE) is LookupResult.MISS


def test_every_tenant_of_an_order_goes_although_files_of_one_are_left(
    stack: _Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes last, whoever's files they are."""
    for key, tag in ((MINE, "aa"), (OTHER, "bb")):
        context = stack.request(tag, tag)
        stack.copy(key, context)
        stack.tiers.complete_store({key}, context)
    stack.settle()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", _refuse)
        stack.tiers.erase({"aa", "bb"})
        with pytest.raises(DiskError, match="1 files"):
            stack.tiers.purge({"aa", "bb"}).result(30)
    assert not stack.disk.store.has("aa", MINE)
    assert not stack.disk.store.has("bb", OTHER)
    assert stack.host(MINE) is stack.host(OTHER) is LookupResult.MISS


def _refuse(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")


def test_a_request_that_has_ended_stores_nothing_behind_the_order(stack: _Stack) -> None:
    """vLLM stores a request's last blocks in the step after its end, when the scheduler has
    forgotten it: the tiers have not."""
    mine = stack.request("a", "aa")
    stack.tiers.erase({"aa"})
    output: Any = stack.tiers.prepare_store([MINE], mine)
    assert output.keys_to_store == []
    stack.tiers.on_request_finished(mine)
    again = stack.request("a", "aa")
    stack.copy(MINE, again)
    stack.tiers.complete_store({MINE}, again)
    stack.settle()
    assert stack.host(MINE) is LookupResult.HIT


class _Waiting:
    """A function that begins, and waits until it is let go on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.began.set()
        assert self.go.wait(30)
        return self._function(*arguments, **named)


def test_an_erasure_waits_for_the_disk_beside_the_steps(
    stack: _Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are gone at once and steps go on; the order is done when the files are gone."""
    stack.store(MINE, stack.request("a", "aa"))
    stack.settle()
    unlink = _Waiting(Path.unlink)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: unlink(path, missing_ok))
    assert stack.tiers.erase({"aa"}) == 2
    files = stack.tiers.purge({"aa"})
    assert unlink.began.wait(30)
    stack.settle()
    stack.store(OTHER, stack.request("b", "bb"))
    stack.settle()
    assert stack.host(MINE) is LookupResult.MISS
    assert not stack.disk.store.has("aa", MINE)
    assert stack.disk.store.has("bb", OTHER)
    assert (files.done(), stack.files()) == (False, 2)
    unlink.go.set()
    files.result(30)
    assert stack.files() == 1


def test_a_load_is_waited_for_until_the_requests_deadline(
    stack: _Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock begins when it first waits; the configured time counts where a request has none of
    its own. What comes later is found again."""
    stack.store(MINE, stack.request("a", "aa"))
    stack.settle()
    stack.tiers.reset_cache()
    read = _Waiting(stack.disk.store.get)
    monkeypatch.setattr(stack.disk.store, "get", read)
    usual = stack.request("b", "aa")
    patient = stack.request("c", "aa", load_deadline_s=60.0)
    hasty = stack.request("d", "aa", load_deadline_s=0.0)
    pending, late = LookupResult.HIT_PENDING, LookupResult.MISS

    def found() -> list[LookupResult]:
        results = [stack.tiers.lookup(MINE, each) for each in (usual, patient, hasty)]
        stack.tiers.on_schedule_end(ScheduleEndContext((), ()))
        return results

    stack.now_s = 100.0
    assert found() == [pending, pending, late]
    assert read.began.wait(30)
    stack.now_s = 104.9
    assert found() == [pending, pending, late]
    stack.now_s = 105.0
    assert found() == [late, pending, late]
    read.go.set()
    stack.settle()
    assert found() == [LookupResult.HIT] * 3


def test_what_waits_for_the_disk_is_half_of_the_host_tier_at_most(
    stack: _Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 rows: four blocks wait, the fifth is not stored. It stays in host memory, and once the disk
    goes on others are stored."""
    put = _Waiting(stack.disk.store.put)
    monkeypatch.setattr(stack.disk.store, "put", put)
    keys = [make_offload_key(bytes([number]) * 32, 0) for number in range(6)]
    for number, key in enumerate(keys[:5]):
        stack.store(key, stack.request(str(number), "aa"))
    assert stack.host(keys[4]) is LookupResult.HIT
    put.go.set()
    stack.settle()
    assert stack.files() == 4
    stack.store(keys[5], stack.request("5", "aa"))
    stack.settle()
    assert [stack.disk.store.has("aa", key) for key in keys] == [True] * 4 + [False, True]


def test_a_lost_slot_is_told_once(stack: _Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory goes on serving; nothing more is stored on disk."""
    told: list[str] = []
    monkeypatch.setattr(offload_disk.logger, "error", lambda text, *_: told.append(text))
    shutil.rmtree(stack.folder)
    for number in range(3):
        key = make_offload_key(bytes([number]) * 32, 0)
        stack.store(key, stack.request(str(number), "aa"))
        stack.settle()
        assert stack.host(key) is LookupResult.HIT
    assert not stack.folder.exists()
    assert told == ["disk tier: nothing is stored any more: %s"]
