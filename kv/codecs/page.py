"""What a page is to a codec: how many numbers of which type, and where keys and values lie."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from xxhash import xxh3_128_digest

from kv.errors import CodecError

AXES = "LHTD"


class Dtype(StrEnum):
    """The number type of a page."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def size_bytes(self) -> int:
        return 4 if self is Dtype.FP32 else 2


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of a page's axes in memory, slowest first: L layers, H KV heads, T tokens, D
    channels of a head. Behind the `outer` axes come all keys, then all values, each in an order of
    its own. Raises CodecError unless both orders have each axis once.
    """

    outer: str
    keys: str
    values: str

    def __post_init__(self) -> None:
        for inner in (self.keys, self.values):
            if sorted(self.outer + inner) != sorted(AXES):
                raise CodecError(
                    f"layout {self.outer}/{self.keys}/{self.values}",
                    f"{self.outer + inner} is no order of {AXES}",
                    "name each axis once",
                )
        if len(self.keys) != len(self.values):
            raise CodecError("layout", f"{self.keys} and {self.values}", "give both the same axes")


# vLLM's CPU attention, ISAs vec and vec16: a head's keys are transposed, its values follow them.
# Its AMX tiles interleave channels in pairs, which no order of axes says: such a page can be cast,
# not grouped.
CPU_ATTENTION = Layout("LH", "DT", "TD")
# Layers of (keys and values, tokens, heads, channels), as most papers draw it.
PLAIN = Layout("L", "THD", "THD")


@dataclass(frozen=True, slots=True)
class Region:
    """The keys or the values of a page: where they begin and the distance between neighbours on
    each of the axes L, H, T, D; all in elements."""

    offset: int
    strides: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class PageShape:
    """One block of one model: 2 * layers * tokens * kv_heads * head_dim numbers.

    Raises CodecError for an axis below 1: an empty page is not a page.
    """

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: Dtype = Dtype.FP32
    layout: Layout = CPU_ATTENTION

    def __post_init__(self) -> None:
        if min(self.layers, self.tokens, self.kv_heads, self.head_dim) < 1:
            raise CodecError("page shape", str(self), "give each axis at least 1")

    def __str__(self) -> str:
        order = f"{self.layout.outer}/{self.layout.keys}/{self.layout.values}"
        return (
            f"layers={self.layers} tokens={self.tokens} kv_heads={self.kv_heads} "
            f"head_dim={self.head_dim} {self.dtype} {order}"
        )

    @property
    def region_elements(self) -> int:
        """How many keys there are, and how many values."""
        return self.layers * self.tokens * self.kv_heads * self.head_dim

    @property
    def page_bytes(self) -> int:
        return 2 * self.region_elements * self.dtype.size_bytes

    @property
    def keys(self) -> Region:
        return self._region(self.layout.keys, 0)

    @property
    def values(self) -> Region:
        return self._region(self.layout.values, prod(self.sizes(self.layout.values)))

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that differ where the shape, dtype, layout or this machine's byte order do."""
        return xxh3_128_digest(f"{self} {sys.byteorder}".encode())

    def sizes(self, axes: str) -> list[int]:
        """The lengths of these axes, in this order."""
        sizes = {"L": self.layers, "H": self.kv_heads, "T": self.tokens, "D": self.head_dim}
        return [sizes[axis] for axis in axes]

    def _region(self, inner: str, offset: int) -> Region:
        stride, strides = 1, {}
        for axis, size in zip(reversed(inner), reversed(self.sizes(inner)), strict=True):
            strides[axis] = stride
            stride *= size
        stride *= 2  # keys and values
        outer = self.layout.outer
        for axis, size in zip(reversed(outer), reversed(self.sizes(outer)), strict=True):
            strides[axis] = stride
            stride *= size
        return Region(offset, (strides["L"], strides["H"], strides["T"], strides["D"]))
