"""What `forget` leaves of blocks that are on their way between tiers: nothing. vLLM's manager over
real memory and files, without an engine."""

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager

from kv import offload_disk
from kv.errors import DiskError
from kv.offload import Tiers
from kv.offload_disk import DiskTier

PAGE = 4096
MINE, OTHER = (make_offload_key(name * 32, 0) for name in (b"m", b"o"))


class _Stack:
    """Host and disk tier, and the steps that an engine would make."""

    def __init__(self, folder: Path) -> None:
        region = SharedOffloadRegion(f"test-{secrets.token_hex(8)}", 8, None, PAGE, PAGE)
        primary = CPUPrimaryTierOffloadingManager(8, region)
        spec: Any = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True))
        view = primary.get_kv_memoryview()
        self.disk = DiskTier(spec, view, "DiskTier", str(folder), 1 << 20, "model")
        self.tiers = Tiers(primary, [self.disk])
        self.folder, self.view = folder, view

    def request(self, name: str, tag: str) -> ReqContext:
        context = ReqContext(name, {"tag": tag})
        self.tiers.on_new_request(context)
        return context

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
        with pytest.raises(DiskError, match="1 files"):
            stack.tiers.erase({"aa", "bb"})
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
