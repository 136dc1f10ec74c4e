"""Pages and payloads as torch tensors, without a copy where there need be none."""

import sys
from collections.abc import Iterator, Sequence

import torch

from kv.codecs.codec import Bytes
from kv.codecs.page import AXES, Dtype, PageShape, Region
from kv.errors import CodecError

TORCH_DTYPES = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16}
# Elements of fp32 scratch that a codec's passes go over before the next run of layers: 1 MiB. Of
# smaller runs the calls cost more than a core's own cache gives back: int8 encodes 1.0, 2.8 and 4.0
# GB/s with 2^14, 2^16 and 2^18 (2 cores of an EPYC, 1 MiB of L2 each).
CHUNK_ELEMENTS = 1 << 18


def tensor(data: Bytes, dtype: torch.dtype) -> torch.Tensor:
    """All of `data`, flat. A read-only buffer is copied, since torch has no read-only tensors."""
    view = memoryview(data)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)


def sections(
    payload: Bytes, layers: int, parts: Sequence[tuple[int, torch.dtype]]
) -> list[torch.Tensor]:
    """Consecutive parts of a payload, (layers, elements of a layer) each. Wider types come first,
    so that each is aligned. Raises CodecError on a big-endian machine: payloads are little-endian.
    """
    if sys.byteorder != "little":
        raise CodecError("payload", f"{sys.byteorder}-endian machine", "store blocks raw")
    flat, tensors, at = tensor(payload, torch.uint8), [], 0
    for count, dtype in parts:
        end = at + layers * count * dtype.itemsize
        tensors.append(flat[at:end].view(dtype).view(layers, count))
        at = end
    return tensors


def sections_bytes(layers: int, parts: Sequence[tuple[int, torch.dtype]]) -> int:
    """Bytes of a payload that has these parts."""
    return layers * sum(count * int(dtype.itemsize) for count, dtype in parts)


def region(page: torch.Tensor, shape: PageShape, where: Region, axes: str) -> torch.Tensor:
    """Keys or values of a flat page as a view whose axes come in the order of `axes`."""
    sizes = shape.sizes(axes)
    strides = [where.strides[AXES.index(axis)] for axis in axes]
    return page.as_strided(sizes, strides, where.offset)


def layer_runs(shape: PageShape) -> Iterator[slice]:
    """Runs of layers of at most CHUNK_ELEMENTS keys each, but at least one layer."""
    step = max(1, CHUNK_ELEMENTS * shape.layers // shape.region_elements)
    for first in range(0, shape.layers, step):
        yield slice(first, min(first + step, shape.layers))


def load(view: torch.Tensor) -> torch.Tensor:
    """A contiguous fp32 copy."""
    return torch.empty(view.shape).copy_(view)


def store(numbers: torch.Tensor, view: torch.Tensor) -> None:
    """Fill `view`. What an fp16 page cannot hold becomes its largest magnitude: an encoded number
    is finite, but half a step more may not be."""
    if view.dtype is torch.float16:
        largest = torch.finfo(torch.float16).max
        numbers.clamp_(-largest, largest)
    view.copy_(numbers.view(view.shape))


def check_finite(codec: str, low: torch.Tensor, high: torch.Tensor, limit: float) -> None:
    """Raises CodecError for a NaN or a magnitude above `limit` between these extremes."""
    largest = max(float(high.amax()), -float(low.amin()))
    # A NaN is in both extremes, and not below anything.
    if not largest <= limit:
        raise CodecError(
            f"{codec} page", f"magnitude {largest:g}, {limit:g} at most", "store it raw"
        )
