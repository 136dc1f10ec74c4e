"""Copies between a CPU engine's pages and the host tier, as vLLM's offloading framework asks for
them; vLLM 0.32 has a worker for GPUs only."""

import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from kv.pages import Plane, copy_pages, planes

logger = init_logger(__name__)


class BatchedCopyWorker(OffloadingWorker):
    """Copies pages of a CPU engine from and to the host tier, on one thread.

    A job is one call into torch (`kv.pages`), which releases the GIL.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        tensors = [(t.tensor, t.page_size_bytes) for t in kv_caches.tensors]
        hosts = [region.create_next_worker_view(page_bytes) for _, page_bytes in tensors]
        self._groups: list[list[Plane]] = []
        for refs in kv_caches.group_data_refs:
            # What pads a layer's page on the device may be of another kind's former block.
            used = dict(sorted((ref.tensor_idx, ref.page_size_bytes) for ref in refs))
            devices = [tensors[index][0][:, :size] for index, size in used.items()]
            held = [hosts[index][:, :size] for index, size in used.items()]
            self._groups.append(planes(devices, held))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
        self._jobs: dict[int, Future[None]] = {}
        self._finished: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec
    ) -> bool:
        return self._submit(job_id, src_spec, dst_spec, store=True)

    def submit_load(
        self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec
    ) -> bool:
        return self._submit(job_id, dst_spec, src_spec, store=False)

    def _submit(
        self, job_id: int, device: GPULoadStoreSpec, host: CPULoadStoreSpec, store: bool
    ) -> bool:
        self._jobs[job_id] = self._pool.submit(self._run, job_id, device, host, store)
        return True

    def _run(
        self, job_id: int, device: GPULoadStoreSpec, host: CPULoadStoreSpec, store: bool
    ) -> None:
        began = time.perf_counter()
        copied: int | None = None
        try:
            copied = self._copy(device, host.chunk_ids.tolist(), store)
        except Exception:  # the thread's edge: the engine ends by a job that failed
            logger.exception("a copy between device and host failed")
        seconds = time.perf_counter() - began
        self._finished.put(TransferResult(job_id, copied is not None, copied, seconds))

    def _copy(self, device: GPULoadStoreSpec, chunks: list[int], store: bool) -> int:
        """Bytes copied. Blocks and chunks come group by group, in the same order."""
        parts, at = [], 0
        for group, size in zip(self._groups, device.group_sizes, strict=True):
            blocks = device.block_ids[at : at + size].tolist()
            parts += [(plane, blocks, chunks[at : at + size]) for plane in group]
            at += size
        return copy_pages(parts, to_host=store)

    def get_finished(self) -> list[TransferResult]:
        finished = []
        while not self._finished.empty():
            finished.append(self._finished.get())
            self._jobs.pop(finished[-1].job_id, None)
        return finished

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids:
            if (job := self._jobs.get(job_id)) is not None:
                job.result()

    def shutdown(self) -> None:
        self._pool.shutdown(wait=True)
        self._groups.clear()
        self._region.cleanup()
