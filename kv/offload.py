"""The tiers behind an engine's paged KV, as vLLM's offloading framework runs them.

`TieredConnector` is what `MultiConnector` loads by `kv_connector_module_path`, and `TieredSpec`
what that loads by `spec_module_path`. The host tier, its eviction, the jobs and their order are
vLLM's own; so are the workers on GPUs. Ours are: a copy worker for CPU engines (vLLM 0.32 has
none), a disk tier with a budget and checksums, and a manager that ends what the stock one may
repeat for ever, and that can erase a tenant (`kv.offload_tiers`).

With its siblings `kv.offload_*` the only module of `kv` that imports vLLM.
tests/flow/test_tiers_contract.py holds the parts of it that we lean on to the pinned version.
"""

import os
from collections import OrderedDict
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import Request

from kv.errors import DiskError
from kv.offload_copy import BatchedCopyWorker
from kv.offload_host import HostTier
from kv.offload_kinds import refuse
from kv.offload_rows import CleanRows
from kv.offload_tiers import LOAD_TIMEOUT_S, Tiers

_MOST_UNREPORTED = 10_000


class TieredConnector(OffloadingConnector):
    """vLLM's connector, which knows of pages that another connector is about to fill, and keeps
    where each request's tokens came from.

    A page that a request gave back may still have to be copied to the host tier. Stock, that copy
    is waited for if the page is given to a request that is computed, or loaded from the tiers; not
    if NIXL writes into it, which would leave the new owner's KV under the old one's name.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Raises `TierError` for a model that tiers are refused for."""
        refuse(vllm_config, kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)
        # By request, until who reports them takes them; those that end unreported go with time.
        self.loaded: OrderedDict[str, dict[CacheHitSource, int]] = OrderedDict()

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        # Stock, a request's `max_load_tokens` are counted behind its device hit, which may be
        # another than its plan knew; a plan's are counted from the start of the prompt.
        reach = (request.kv_transfer_params or {}).get("max_load_tokens")
        if reach is not None:
            status = self.connector_scheduler._req_status[request.request_id]
            status.max_load_tokens = max(0, reach - num_computed_tokens)
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        return found

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        sources: dict[CacheHitSource, int] = super().get_external_cache_hit_sources(
            request, num_external_tokens
        )
        self.loaded[request.request_id] = sources
        if len(self.loaded) > _MOST_UNREPORTED:
            self.loaded.popitem(last=False)
        return sources

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        given = (block for group in blocks.blocks for block in group if block.block_hash is None)
        allocated = self.scheduler._current_batch_allocated_block_ids
        allocated.update(block.block_id for block in given if not block.is_null)
        super().update_state_after_alloc(request, blocks, num_external_tokens)


class TieredSpec(TieringOffloadingSpec):
    """vLLM's tiering spec on every platform; raises `DiskError` for tiers without room."""

    # Of the base class.
    _manager: Any
    _worker: Any

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        if self.blocks_per_chunk != 1:
            raise ValueError(f"{self.blocks_per_chunk} blocks a chunk; one wanted")
        if self.num_chunks < 1:
            raise DiskError(
                "tiers.host",
                f"{self.extra_config['cpu_bytes_to_use']} bytes hold no block of "
                f"{self.kv_bytes_per_chunk}",
                "raise tiers.host.bytes",
            )

    def get_manager(self) -> Tiers:
        if self._manager is None:
            region = self._region(rank=None)
            # Every worker has mapped it by now: vLLM initializes them first. Without a name it
            # goes with its last process, however that ends.
            if not region._creator:
                os.unlink(region.mmap_path)
            kind = CleanRows if len(self.config.groups) > 1 else HostTier
            primary = kind(
                num_chunks=self.num_chunks,
                mmap_region=region,
                enable_events=self.kv_events_config.enable_kv_cache_events,
            )
            view = primary.get_kv_memoryview()
            create = SecondaryTierFactory.create_secondary_tier
            tiers = [create(config, view, self) for config in self.secondary_tier_configs]
            timeout_s = self.extra_config.get("load_timeout_s", LOAD_TIMEOUT_S)
            self._manager = Tiers(primary, tiers, timeout_s)
            self._manager.one_group = len(self.config.groups) == 1
        manager: Tiers = self._manager
        return manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if current_platform.is_cuda_alike() or current_platform.is_xpu():
            worker: Any = super().get_worker(kv_caches)
            worker._mmap_region._creator = False
            stock: OffloadingWorker = worker
            return stock
        if self._worker is None:
            rank = 0 if self.replicated_layout else self.config.parallel.rank
            region = self._region(rank)
            region._creator = False  # `get_manager` removes the name
            self._worker = BatchedCopyWorker(kv_caches, region)
        ours: OffloadingWorker = self._worker
        return ours

    def _region(self, rank: int | None) -> SharedOffloadRegion:
        return SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
