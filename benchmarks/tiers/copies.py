"""Copies of blocks between an engine's pages and the host tier, against one memcpy.

What the CPU engine's copy worker does for a job (`kv.pages`, over the shared memory that vLLM makes
for the host tier), with blocks at random places on both sides, beside one `memmove` of the same
bytes between the same two memories. Both are larger than the last-level cache; one thread; the
three take turns, and each copy is compared with the memcpy of its own direction beside it.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from benchmarks.result import Row, at_least, spread
from kv.pages import Plane, copy_pages, planes

TARGET = 0.8
MODELS = {"the default model": (30, 49_152), "a tiny model": (2, 16_384)}
# A chunk of a prefill of 512 tokens, and a prompt of 4,096.
JOBS = (16, 128)
MEMORY_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Memory:
    """Both sides: their views by block, how many blocks each holds, and where they start."""

    plane: Plane
    device: torch.Tensor
    host: torch.Tensor
    blocks: int

    @property
    def block_bytes(self) -> int:
        return self.plane.page_bytes


def measure(quick: bool) -> list[Row]:
    """Rows of both models' blocks."""
    torch.set_num_threads(1)
    found = []
    for name, (layers, page_bytes) in MODELS.items():
        region = _region(layers * page_bytes, MEMORY_BYTES >> (4 if quick else 0))
        try:
            memory = _memory(region, layers, page_bytes)
            for blocks in JOBS:
                found += _job_rows(name, memory, blocks, 5 if quick else 60)
                _prove(memory, blocks)
            del memory
        finally:
            region.cleanup()
    return found


def _region(block_bytes: int, memory_bytes: int) -> SharedOffloadRegion:
    """The host tier's memory; without a name it goes with this process."""
    name = f"bench-{os.getpid()}"
    chunks = max(2 * JOBS[-1], memory_bytes // block_bytes)
    region = SharedOffloadRegion(name, chunks, 0, block_bytes, block_bytes)
    os.unlink(region.mmap_path)
    region._creator = False
    return region


def _memory(region: SharedOffloadRegion, layers: int, page_bytes: int) -> Memory:
    blocks = region.num_chunks
    # As vLLM's CPU engine has it: all blocks of a layer, then those of the next.
    device = torch.randint(-128, 127, (layers, blocks, page_bytes), dtype=torch.int8)
    hosts = [region.create_next_worker_view(page_bytes) for _ in range(layers)]
    [plane] = planes(list(device.unbind(0)), hosts)
    return Memory(plane, device, region.base_tensor, blocks)


def _job_rows(name: str, memory: Memory, blocks: int, repeats: int) -> list[Row]:
    size_bytes = blocks * memory.block_bytes
    ratios: dict[str, list[float]] = {"store": [], "load": []}
    rates: dict[str, list[float]] = {"store": [], "load": []}
    for repeat in range(repeats + 1):
        for direction in ratios:
            to_host = direction == "store"
            actions = [_copy(memory, blocks, to_host), _memcpy(memory, size_bytes, to_host)]
            # Each comes first in every second repeat.
            first = repeat % 2
            spent = [_seconds(action) for action in (actions[first], actions[1 - first])]
            copy_s, memcpy_s = spent[first], spent[1 - first]
            if repeat:  # the first touches memory for the first time
                ratios[direction].append(memcpy_s / copy_s)
                rates[direction].append(size_bytes / copy_s / 1e9)
    return [
        at_least(
            f"{direction} of {blocks} blocks of {name}, against memcpy",
            statistics.median(ratios[direction]),
            "x",
            TARGET,
            f"{_quartiles(ratios[direction])}; {spread(rates[direction], 'GB/s')}; "
            f"{size_bytes / 1e6:.3g} MB a job",
        )
        for direction in ratios
    ]


def _quartiles(values: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"half of {len(values)} within {low:.2f}..{high:.2f}"


def _seconds(action: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _copy(memory: Memory, blocks: int, to_host: bool) -> Callable[[], Any]:
    """A job over blocks at random places, none twice on a side."""
    device, host = (torch.randperm(memory.blocks)[:blocks].tolist() for _ in range(2))
    return lambda: copy_pages([(memory.plane, device, host)], to_host)


def _memcpy(memory: Memory, size_bytes: int, to_host: bool) -> Callable[[], Any]:
    """One run of bytes from a random place to another, cache lines aligned."""
    spare = memory.blocks * memory.block_bytes - size_bytes
    device, host = (
        side.data_ptr() + 64 * int(torch.randint(0, spare // 64 + 1, (1,)))
        for side in (memory.device, memory.host)
    )
    into, out_of = (host, device) if to_host else (device, host)
    return lambda: ctypes.memmove(into, out_of, size_bytes)


def _prove(memory: Memory, blocks: int) -> None:
    """Raises `RuntimeError` unless a job moves each block's bytes to its chunk."""
    device, host = list(range(blocks)), list(range(blocks, 2 * blocks))
    copy_pages([(memory.plane, device, host)], to_host=True)
    for block, chunk in ((0, blocks), (blocks - 1, 2 * blocks - 1)):
        if not torch.equal(memory.plane.device[block], memory.plane.host[chunk]):
            raise RuntimeError(f"block {block} is not what chunk {chunk} holds after its copy")
