"""The disk tier as vLLM's offloading framework sees it (`kv.disk` has the files).

vLLM's `fs` tier has neither a budget nor checksums, asks the file system about each block, and
writes what others may read; of it, the thread pool is used here.
"""

import os
import platform
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
import vllm
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector, DropStorePolicy
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kv.disk import DiskStore, file_bytes
from kv.disk_seal import Checked, Encrypted, read_key
from kv.errors import DamagedBlockError, DiskError, LostSlotError
from kv.fingerprint import fingerprint
from kv.salt import UNTAGGED

logger = init_logger(__name__)

# In a request's kv_transfer_params: the tag of its salt (`kv.salt`).
TAG = "tag"
# One complaint a tier and so many seconds: a full disk fails every store.
_COMPLAIN_EVERY_S = 60.0
# Threads that read for one load: one checks a block while the other's is on its way.
_READERS = 2


class StoreQueue(BackpressureDetector):
    """Blocks of the host tier that wait to be stored: each is kept from being evicted meanwhile.

    vLLM's own detector goes by how long finished stores took, and hears nothing of a disk that
    hangs. Here what would be more than `most_blocks` is not stored, unless nothing else waits.
    """

    def __init__(self, most_blocks: int, dropped: Callable[[int], None]) -> None:
        super().__init__(DropStorePolicy())
        self._most_blocks, self._dropped = most_blocks, dropped
        self.blocks = 0

    def is_under_pressure(self) -> bool:
        return self.blocks >= self._most_blocks

    def should_store(self, num_blocks: int) -> bool:
        if self.blocks and self.blocks + num_blocks > self._most_blocks:
            self.policy.on_store_skipped(num_blocks)
            self._dropped(num_blocks)
            return False
        return True

    def on_store_completed(self, elapsed_s: float, num_bytes: int) -> None:
        """How long a store took does not matter."""

    def reset(self) -> None:
        self.policy.reset()


class _Load:
    """One job's blocks, of which each of the pool's threads takes the next."""

    def __init__(self, job: TransferJob) -> None:
        self._blocks, self.tag = len(job.keys), tag_of(job.req_context)
        self.left = iter(list(zip(job.keys, job.chunk_ids.tolist(), strict=True)))
        self.done: list[OffloadKey] = []
        self.failure: Exception | None = None  # the last
        self.began_s = self.ended_s = 0.0

    def seconds(self) -> float:
        return self.ended_s - self.began_s

    def complain(self) -> None:
        if self.failure is not None:
            logger.warning(
                "disk tier: %d of %d blocks could not be read and are removed: %s",
                self._blocks - len(self.done),
                self._blocks,
                self.failure,
            )


class DiskTier(SecondaryTierManager):
    """Blocks in files behind the host tier (`kv.disk`).

    A block is loadable only once its checksum was verified in the host tier's memory. One that
    fails is removed, so that the next lookup misses and the engine computes it.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: TieringOffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        path: str,
        budget_bytes: int,
        identity: str,
        key_file: str | None = None,
        backpressure_detector: Any = None,
    ) -> None:
        """`identity` says all of the model and its options that the spec does not know; with a
        `key_file` (`kv.disk_seal`) blocks are encrypted, and found under that key alone."""
        # Promotions may take the other half of the host tier.
        queue = StoreQueue(max(1, len(primary_kv_view) // 2), self._not_queued)
        super().__init__(offloading_spec, primary_kv_view, tier_type, queue)
        self._queue = queue
        self.locality = Locality.LOCAL
        seal = Checked() if key_file is None else Encrypted(read_key(Path(key_file)))
        wanted = file_bytes(self._block_size_bytes, seal.overhead_bytes)
        if wanted > budget_bytes:
            numbers = f"{budget_bytes} bytes hold no block of {wanted}"
            raise DiskError("tiers.disk", numbers, "raise tiers.disk.bytes")
        layout = layout_of(offloading_spec, identity)
        if isinstance(seal, Encrypted):
            layout = fingerprint({"layout": layout, "key": seal.key_id})
        self.store = DiskStore(Path(path), layout, budget_bytes, seal)
        self._pool = DualQueueThreadPool(1, 1, thread_name_prefix="kv-disk")
        # Not behind stores that a slow disk keeps waiting.
        self._eraser = ThreadPoolExecutor(1, thread_name_prefix="kv-erase")
        self._lost = False
        self._jobs: dict[int, TransferJob] = {}
        self._loads: dict[int, _Load] = {}
        self._done: dict[int, list[OffloadKey]] = {}  # of stores
        self._void: set[int] = set()  # jobs that are to store nothing more
        self._events: list[OffloadingEvent] = []
        self._publishes = offloading_spec.kv_events_config.enable_kv_cache_events
        self._complained_at = -_COMPLAIN_EVERY_S

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        here = self.store.has(tag_of(req_context), key)
        return LookupResult.HIT if here else LookupResult.MISS

    def on_request_finished(self, req_context: ReqContext) -> None:
        tag = tag_of(req_context)
        for key in _ends_first(req_context._offload_key_positions, req_context):
            self.store.touch(tag, key)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._jobs[job_metadata.job_id] = job_metadata
        self._queue.blocks += len(job_metadata.keys)
        self._pool.enqueue_store(job_metadata.job_id, 1, [lambda: self._store(job_metadata)])

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._jobs[job_metadata.job_id] = job_metadata
        load = self._loads[job_metadata.job_id] = _Load(job_metadata)
        tasks = [lambda: self._load(load)] * _READERS
        self._pool.enqueue_load(job_metadata.job_id, len(tasks), tasks)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for job_id, _, seconds in self._pool.get_finished():
            job, done = self._jobs.pop(job_id), self._done.pop(job_id, [])
            self._void.discard(job_id)
            if (load := self._loads.pop(job_id, None)) is not None:
                done, seconds = load.done, load.seconds()
                load.complain()
            else:
                self._queue.blocks -= len(job.keys)
            if not job.is_promotion and self._publishes and done:
                self._events.append(OffloadingEvent(done, self.medium, False, self.locality))
            results.append(
                JobResult(
                    job_id,
                    success=len(done) == len(job.keys),
                    successful_keys=tuple(done),
                    transfer_time=seconds,
                    transfer_bytes=len(done) * self._block_size_bytes,
                )
            )
        return results

    def take_events(self) -> Iterable[OffloadingEvent]:
        removed = [OffloadKey(key) for key in self.store.take_removed()]
        if removed and self._publishes:
            self._events.append(OffloadingEvent(removed, self.medium, True, self.locality))
        events, self._events = self._events, []
        return events

    def erase(self, tags: Collection[str]) -> int:
        """Have no block with one of these tags found any more, and store none that waits to be;
        returns how many. The files are `purge`'s."""
        for job_id, job in self._jobs.items():
            if not job.is_promotion and tag_of(job.req_context) in tags:
                self._void.add(job_id)
        return sum(self.store.drop(tag) for tag in tags)

    def purge(self, tags: Collection[str]) -> Future[None]:
        """Unlink the files of tags that were erased, beside the engine's steps. The result comes
        when they are gone, or is `DiskError` as of `DiskStore.purge`."""
        return self._eraser.submit(self._purge, tuple(tags))

    def clear(self) -> None:
        """Have no block found any more; the files follow."""
        self.store.clear()
        self._eraser.submit(self.store.sweep)

    def drain_jobs(self) -> None:
        self._pool.wait_idle()

    def shutdown(self) -> None:
        self._pool.shutdown(wait=True)
        self._eraser.shutdown(wait=True)
        self.store.close()

    def _not_queued(self, blocks: int) -> None:
        self._complain("stored", blocks, "as many wait as may")

    # ------------------------------------------------------------------ the pool's threads

    def _purge(self, tags: Collection[str]) -> None:
        failure = None
        for tag in tags:
            try:
                self.store.purge(tag)
            except DiskError as error:  # the other tenants go all the same
                failure = error
        if failure is not None:
            raise failure

    def _store(self, job: TransferJob) -> None:
        done = self._done[job.job_id] = []
        tag = tag_of(job.req_context)
        rows = dict(zip(job.keys, job.chunk_ids.tolist(), strict=True))

        def wanted() -> bool:
            return job.job_id not in self._void

        for key in _ends_first(rows, job.req_context):
            try:
                if self.store.put(tag, key, self._row(rows[key]), wanted):
                    done.append(key)
            except OSError as error:
                self._complain("stored", len(job.keys) - len(done), error)
                return
            except LostSlotError as error:
                if not self._lost:
                    logger.error("disk tier: nothing is stored any more: %s", error)
                self._lost = True
                return

    def _load(self, load: "_Load") -> None:
        load.began_s = load.began_s or time.monotonic()
        for key, row in load.left:
            try:
                self.store.get(load.tag, key, self._row(row))
                load.done.append(key)
            except (OSError, DamagedBlockError) as error:
                load.failure = error
        load.ended_s = time.monotonic()

    def _row(self, row: int) -> memoryview:
        view: memoryview = self._primary_kv_view[row : row + 1].cast("B")
        return view

    def _complain(self, what: str, blocks: int, error: object) -> None:
        now = time.monotonic()
        if now - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = now
            logger.warning("disk tier: %d blocks not %s: %s", blocks, what, error)


def _ends_first(keys: Iterable[OffloadKey], req_context: ReqContext) -> list[OffloadKey]:
    """Blocks of a request from its end to its start, which makes the start the youngest: what is
    behind a block is of no use without it. vLLM hands stored keys over in no order."""
    position = req_context.get_offload_key_position
    return sorted(keys, key=lambda key: position(key) or 0, reverse=True)


def tag_of(req_context: ReqContext) -> str:
    """Whose blocks a request names (`kv.salt`)."""
    tag: str = (req_context.kv_transfer_params or {}).get(TAG, UNTAGGED)
    return tag


def layout_of(spec: TieringOffloadingSpec, identity: str) -> str:
    """The fingerprint of what `spec` stores."""
    config = spec.config
    groups = [[group.tokens_per_block, *group.layer_names] for group in config.groups]
    return fingerprint(
        {
            "identity": identity,
            "dtype": config.model.dtype,
            "layout": config.kv_cache_layout,
            "groups": groups,
            "row_bytes": spec.kv_bytes_per_chunk,
            "ranks": [config.parallel.tp_size, config.parallel.pp_size, config.parallel.world_size],
            "versions": [vllm.__version__, torch.__version__],
            "machine": [platform.machine(), _instructions(), current_platform.device_type],
            # Names of blocks derive from it where it is set.
            "hash_seed": os.environ.get("PYTHONHASHSEED"),
        }
    )


def _instructions() -> str:
    """The instruction sets that a CPU engine chooses its page layout by, or the GPU's name."""
    if current_platform.is_cuda_alike() or current_platform.is_xpu():
        return str(current_platform.get_device_name())
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    vectors = ("avx", "amx", "sse4", "asimd", "sve", "bf16")
    return " ".join(sorted(flag for flag in flags.split() if flag.startswith(vectors)))
