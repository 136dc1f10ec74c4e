"""Pages of a CPU engine's paged KV and of the host tier, and copies between the two.

A layer's pages lie in a row of their own on the engine's side, and beside those of the other
layers of the same block on the host's. Views of both are made once, for each block, over as many
layers as lie evenly spaced; a copy is then one call into torch for any number of blocks. It
releases the GIL and copies once. Gathering by index (`index_select`, `index_copy_`) copies twice,
through a temporary, and a call for each page holds the GIL for most of its time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Plane:
    """Layers that lie evenly spaced in one allocation: one view of all of them for each block."""

    device: Sequence[torch.Tensor]
    host: Sequence[torch.Tensor]
    page_bytes: int


def planes(devices: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor]) -> list[Plane]:
    """Views to copy by, for tensors of (blocks, page bytes) and their (chunks, page bytes)."""
    made, first = [], 0
    for end in range(1, len(devices) + 1):
        if end < len(devices) and _continues(devices, hosts, first, end):
            continue
        device, host = _in_words(_stacked(devices[first:end]), _stacked(hosts[first:end]))
        page_bytes = (end - first) * devices[first].shape[1]
        made.append(Plane(device.unbind(0), host.unbind(0), page_bytes))
        first = end
    return made


def copy_pages(parts: Iterable[tuple[Plane, Sequence[int], Sequence[int]]], to_host: bool) -> int:
    """Copy blocks of the engine to chunks of the host tier, or back; returns the bytes."""
    device: list[torch.Tensor] = []
    host: list[torch.Tensor] = []
    copied = 0
    for plane, blocks, chunks in parts:
        device += [plane.device[block] for block in blocks]
        host += [plane.host[chunk] for chunk in chunks]
        copied += len(blocks) * plane.page_bytes
    if not device:
        return 0
    if to_host:
        torch._foreach_copy_(host, device)
    else:
        torch._foreach_copy_(device, host)
    return copied


def _continues(
    devices: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor], first: int, at: int
) -> bool:
    """Whether tensor `at` follows those from `first` on at the same distance, on both sides."""
    for side in (devices, hosts):
        a, b = side[first], side[at]
        apart = side[first + 1].data_ptr() - a.data_ptr()
        same = a.shape == b.shape and a.stride() == b.stride()
        here = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        spaced = apart > 0 and b.data_ptr() == a.data_ptr() + (at - first) * apart
        if not (same and here and spaced):
            return False
    return True


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Evenly spaced tensors of (rows, bytes) as one of (rows, tensors, bytes)."""
    first = tensors[0]
    apart = tensors[1].data_ptr() - first.data_ptr() if len(tensors) > 1 else first.shape[1]
    size = (first.shape[0], len(tensors), first.shape[1])
    return first.as_strided(size, (first.stride(0), apart, 1), first.storage_offset())


def _in_words(*sides: torch.Tensor) -> list[torch.Tensor]:
    """The same bytes eight at a time, where those of both sides are aligned."""
    if all(_aligned(side) for side in sides):
        return [side.view(torch.int64) for side in sides]
    return list(sides)


def _aligned(rows: torch.Tensor) -> bool:
    numbers = (rows.data_ptr(), rows.shape[2], *rows.stride()[:2], rows.storage_offset())
    return all(number % 8 == 0 for number in numbers)
