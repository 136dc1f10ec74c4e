"""Which parts of vLLM's offloading framework `kv.offload` and `workers.tiers` lean on."""

import inspect
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import metrics, scheduler, worker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.sched import scheduler as core_scheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingWorker,
    ReqContext,
    TransferResult,
    make_offload_key,
)
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import (
    JobResult,
    SecondaryTierManager,
    TieringOffloadingMetrics,
    TransferJob,
)
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)
from vllm.v1.kv_offload.tiering.metrics import TieringMetricsTracker
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kv.catalogue import Tier
from kv.head import Head
from kv.offload import BatchedCopyWorker, TieredConnector, TieredSpec
from kv.offload_disk import TAG, DiskTier, StoreQueue
from kv.offload_host import HostTier
from kv.offload_rows import CleanRows
from kv.offload_split import SplitLookups
from kv.offload_tiers import Tiers
from kv.plan import Hints
from kv.promoted import DEADLINE
from workers.counters import LOADED, METRICS_BY_TIER, PROMOTED, SOURCES, TIER_METRICS
from workers.errors import EngineOptionError
from workers.options import namespace
from workers.peer.tier import PeerTier
from workers.tiers import NO_TIERS, TIERED_CONNECTOR, VAULT_STORED_BYTES, with_hints
from workers.vault.tier import VaultTier


def test_our_classes_leave_nothing_abstract() -> None:
    """A new version that asks for another method is seen here, not at an engine's start."""
    tiers = (HostTier, CleanRows, DiskTier, PeerTier, VaultTier)
    for kind in (TieredSpec, Tiers, *tiers, BatchedCopyWorker, StoreQueue):
        assert not getattr(kind, "__abstractmethods__", frozenset())


def test_what_we_override_is_still_called_so() -> None:
    """A method that upstream renamed would silently be its own again."""
    of_the_manager = "lookup _initiate_promotion prepare_load prepare_store complete_store"
    of_the_manager += " on_request_finished on_schedule_end has_pending_work reset_cache"
    of_the_manager += " _should_store_to_tier"
    of_a_tier = ["lookup", "submit_store", "submit_load"]
    of_the_connector = [
        "__init__",
        "update_state_after_alloc",
        "get_external_cache_hit_sources",
        "get_num_new_matched_tokens",
    ]
    overridden = [
        (OffloadingConnector, TieredConnector, of_the_connector),
        (TieringOffloadingSpec, TieredSpec, ["get_manager", "get_worker"]),
        (TieringOffloadingManager, Tiers, of_the_manager.split()),
        (SecondaryTierManager, DiskTier, of_a_tier),
        (TieringOffloadingManager, SplitLookups, ["lookup", "on_new_request", "on_schedule_end"]),
        (
            SecondaryTierManager,
            PeerTier,
            [*of_a_tier, "on_new_request", "on_request_finished", "on_schedule_end"],
        ),
        (
            SecondaryTierManager,
            VaultTier,
            [*of_a_tier, "get_stats", "drain_jobs", "on_schedule_end"],
        ),
        (OffloadingWorker, BatchedCopyWorker, ["submit_store", "submit_load", "get_finished"]),
        (CPUPrimaryTierOffloadingManager, CleanRows, ["prepare_store"]),
        (BackpressureDetector, StoreQueue, ["should_store", "on_store_completed", "reset"]),
    ]
    for theirs, ours, names in overridden:
        for name in names:
            assert name in vars(ours)
            assert _parameters(getattr(ours, name)) == _parameters(getattr(theirs, name)), name


def test_a_refused_promotion_is_a_miss() -> None:
    """What ends a request's retries: `_initiate_promotion` answers False."""
    source = inspect.getsource(TieringOffloadingManager.lookup)
    assert "MISS if not promoted" in source


def test_a_request_waits_whatever_is_missed_behind_a_later() -> None:
    """A miss ends the search for a prefix, and "later" before it is not forgotten."""
    keys = [make_offload_key(bytes([at]) * 32, 0) for at in range(4)]
    answers = iter([LookupResult.HIT, LookupResult.RETRY, LookupResult.MISS])
    theirs = object.__new__(scheduler.OffloadingConnectorScheduler)
    vars(theirs).update(
        manager=SimpleNamespace(lookup=lambda *_: next(answers)),
        _events_tracker=SimpleNamespace(record_lookup=lambda *_: None),
    )
    assert theirs._maximal_prefix_lookup(keys, None, None, None, 0) is None


def test_a_tail_is_looked_up_behind_a_head_that_comes_later() -> None:
    """A split's tail is fetched while its head is waited for: "later" does not end the search."""
    keys = [make_offload_key(bytes([at]) * 32, 0) for at in range(4)]
    answers = iter([LookupResult.RETRY, LookupResult.RETRY, LookupResult.HIT_PENDING])
    theirs = object.__new__(scheduler.OffloadingConnectorScheduler)
    vars(theirs).update(manager=SimpleNamespace(lookup=lambda *_: next(answers)))
    assert theirs._maximal_prefix_lookup(keys[:3], None, None, None, 0) is None
    assert not list(answers)


def test_a_tier_hears_of_a_requests_end_when_its_blocks_are_in_host_memory() -> None:
    """So that what a peer's request has not stored by then will not come."""
    source = inspect.getsource(TieringOffloadingManager._maybe_finalize_request)
    waits = source.index("if state.pending_primary_stores != 0:\n            return")
    assert waits < source.index("tier.on_request_finished(state.req_context)")


def test_a_split_is_not_looked_up_in_each_step() -> None:
    """In between a step ends at once, and waits on, even past its deadline: only a whole look may
    say that what has come by then is all. Models of several groups are looked at in each step."""
    manager = object.__new__(Tiers)
    manager._doomed, manager._step, manager.one_group = set(), 0, True
    context = ReqContext("r", {DEADLINE: 0.0})
    context.set_state(Head(64))
    keys = [make_offload_key(bytes([at]) * 32, 0) for at in range(3)]
    assert [manager._between_looks(key, context) for key in keys] == [None] * 3
    manager._step = 1
    assert manager.lookup(keys[0], context) is LookupResult.RETRY
    assert manager.lookup(keys[1], context) is LookupResult.MISS
    manager._step, manager.one_group = 2, False
    assert manager._between_looks(keys[0], context) is None
    assert manager._between_looks(keys[0], ReqContext("not split")) is None


def test_the_shared_region_keeps_its_name_and_its_creator() -> None:
    """`TieredSpec` removes the name once everybody has mapped it; `down` sweeps by its form."""
    source = inspect.getsource(SharedOffloadRegion.__init__)
    assert 'f"/dev/shm/vllm_offload_{engine_id}.mmap"' in source
    assert "self._creator = True" in source
    assert "0o600" in source
    assert "self._mmap_region = mmap_region" in inspect.getsource(CPUOffloadingWorker)


def test_workers_map_the_region_before_the_scheduler() -> None:
    """So the scheduler may remove the name: KV caches come first in the engine's constructor."""
    source = inspect.getsource(EngineCore.__init__)
    assert source.index("_initialize_kv_caches(") < source.index("self.scheduler")


def test_the_host_tier_has_what_the_erasure_uses() -> None:
    """Chunks by key, reference counts, and where free ones go."""
    source = inspect.getsource(CPUOffloadingManager)
    for name in ("self._policy", "self._num_evictable_cache_chunks", "_free_chunk", "self.events"):
        assert name in source
    assert {"get", "remove"} <= set(vars(LRUCachePolicy))


def test_a_key_is_a_hash_and_its_group_as_in_the_block_pool() -> None:
    """Tiers and device name blocks alike, and a key fills a file name."""
    name = b"h" * 32
    assert make_offload_key(name, 3) == make_block_hash_with_group_id(name, 3)  # type: ignore[arg-type]
    assert len(make_offload_key(name, 3)) == 36


def test_hints_are_read_where_we_put_them() -> None:
    """Upper bounds of what is loaded and stored, and the request's parameters for tiers."""
    source = inspect.getsource(scheduler.RequestOffloadState)
    assert all(f'"{name}"' in source for name in NO_TIERS)
    hinted = with_hints(None, "", Hints(5, tuple(Tier), 1.0))
    matchers = hinted.pop(scheduler.KV_LOAD_TIERS_KEY)
    parsed = scheduler._parse_tier_filter(matchers)
    assert [parsed.allows(m, where) for m in Medium for where in Locality] == [
        False,
        True,
        True,
        True,
    ]
    assert not scheduler._parse_tier_filter([]).allows(Medium.STORAGE, Locality.LOCAL)
    assert hinted == {"tag": "", "max_load_tokens": 5, DEADLINE: 1.0}
    assert "max_load_tokens" in scheduler.RequestOffloadState.__slots__
    init = inspect.getsource(scheduler.OffloadingConnectorScheduler.__init__)
    assert "self._req_status" in init
    assert {"kv_transfer_params", "_offload_key_positions"} <= _fields(ReqContext)
    assert TAG in with_hints(None, "aa")
    assert "self.kv_transfer_params" in inspect.getsource(core_scheduler.Request.__init__)


def test_jobs_and_results_have_the_fields_that_we_fill() -> None:
    """Also that a promotion may succeed in part."""
    assert {"job_id", "keys", "chunk_ids", "req_context", "is_promotion"} <= _fields(TransferJob)
    assert {"job_id", "success", "successful_keys", "transfer_time"} <= _fields(JobResult)
    assert {"job_id", "success", "transfer_size", "transfer_time"} == _fields(TransferResult)
    assert "assert transfer_result.success" in inspect.getsource(worker)


def test_promotions_get_their_rows_where_stores_do() -> None:
    """So that `CleanRows` overwrites the rows of both."""
    source = inspect.getsource(CPUPrimaryTierOffloadingManager.__init__)
    assert "self.prepare_write = self.prepare_store" in source


def test_a_tier_is_asked_whether_it_wants_a_store_before_the_blocks_are_held() -> None:
    """`StoreQueue` bounds what a slow disk keeps in host memory."""
    source = inspect.getsource(TieringOffloadingManager.complete_store)
    assert source.index("_should_store_to_tier(") < source.index("create_store_job(")
    assert "tier.bp_detector" in inspect.getsource(TieringOffloadingManager._should_store_to_tier)


def test_tiers_are_loaded_by_module_path() -> None:
    """The spec and our tiers by class name, with what else the configuration says."""
    for ours in (DiskTier, VaultTier):
        config = {"type": ours.__name__, "module_path": ours.__module__}
        assert SecondaryTierFactory.get_tier_class(config) is ours
    assert {"enqueue_load", "enqueue_store", "get_finished", "wait_idle"} <= set(
        vars(DualQueueThreadPool)
    )


def test_connectors_are_found_and_counted_by_name() -> None:
    """`workers.engine` finds the manager and tells the two connectors' statistics apart."""
    assert isinstance(multi_connector.MultiConnector.sub_connectors, property)
    assert isinstance(OffloadingConnector.scheduler, property)
    assert TieredConnector.__name__ == TIERED_CONNECTOR
    source = inspect.getsource(multi_connector.MultiConnector.get_kv_connector_stats)
    assert "__class__.__name__" in source
    known = set(vars(metrics._TransferMetricName).values())
    known |= set(vars(TieringOffloadingMetrics).values())
    told = {*TIER_METRICS, *METRICS_BY_TIER, *LOADED, *PROMOTED}
    assert told - {VAULT_STORED_BYTES} <= known
    assert set(SOURCES) <= set(CacheHitSource)
    # A tier's label is its place and its type, which is its class where it is loaded by module.
    assert 'f"{tier_idx + 1}:{self._tier_types[tier_idx]}"' in inspect.getsource(
        TieringMetricsTracker.tier_label.__wrapped__
    )
    assert metrics._StatsKey.DATA == "data"


def test_a_page_that_a_handoff_fills_is_copied_first() -> None:
    """vLLM's scheduler side has the worker finish a copy out of a page before NIXL reads into it:
    the old owner has ended, its copy is under way, and no token is loaded from tiers."""
    flushed = []
    for block_hash in (None, b"named"):
        connector = object.__new__(TieredConnector)
        connector.connector_scheduler = theirs = object.__new__(
            scheduler.OffloadingConnectorScheduler
        )
        vars(theirs).update(
            manager=SimpleNamespace(on_schedule_end=lambda _: None),
            config=SimpleNamespace(
                kv_group_configs=(), supports_partial_tail=False, blocks_per_chunk=1
            ),
            _sliding_window_groups=(),
            _req_status={},
            _current_batch_load_jobs={},
            _current_batch_jobs_to_flush=set(),
            _current_batch_allocated_block_ids=set(),
            _block_id_to_pending_jobs={7: {1}},
        )
        page = KVCacheBlock(7)
        page._block_hash = block_hash  # type: ignore[assignment]
        connector.update_state_after_alloc(None, KVCacheBlocks(([page],)), 0)  # type: ignore[arg-type]
        meta: Any = connector.build_connector_meta(SchedulerOutput.make_empty())
        flushed.append(meta.jobs_to_flush)
    assert flushed == [{1}, set()]  # a page with a name is a prefix hit: nobody writes to it


def test_vllms_own_offloading_option_is_ours() -> None:
    """It would take the place of the connector for handoffs (`_post_init_kv_transfer_config`)."""
    assert "kv_transfer_config.kv_connector = config_connector" in inspect.getsource(VllmConfig)
    with pytest.raises(EngineOptionError, match="set by Breakeven"):
        namespace("model", ("model",), {"kv_offloading_size": 4})


def test_an_engine_steps_while_a_tier_works() -> None:
    """Jobs of requests that ended are finished too."""
    assert "has_pending_push_work" in inspect.getsource(core_scheduler.Scheduler.has_requests)


def _parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def _fields(kind: type) -> set[str]:
    return {each.name for each in fields(kind)}
