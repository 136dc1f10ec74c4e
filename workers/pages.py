"""What an engine's pages hold, as vLLM laid them out: the KV geometry of one rank.

`kv.hf.config` gives the same from the model's config alone; tests/flow/test_geometry.py holds the
two together. Pages of hybrid models are padded to one length, and count here as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kv.geometry import Geometry, State, StatePart


@dataclass(frozen=True, slots=True)
class PagedLayers:
    """Layers whose pages have `page_bytes` for `page_tokens` tokens each."""

    layers: int
    page_bytes: int
    page_tokens: int
    window_tokens: int | None

    @property
    def token_bytes(self) -> int:
        return self.layers * self.page_bytes // self.page_tokens

    @property
    def state_bytes(self) -> int:
        return 0

    def on_rank(self, ranks: int) -> Self:
        """An engine's pages are one rank's already."""
        return self


def geometry(config: KVCacheConfig) -> Geometry:
    """The geometry of what one rank allocated."""
    return Geometry(tuple(_groups(config)))


def _groups(config: KVCacheConfig) -> Iterator[PagedLayers | State]:
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            yield from (_group(1, each) for each in spec.kv_cache_specs.values())
        else:
            yield _group(len(group.layer_names), spec)


def _group(layers: int, spec: KVCacheSpec) -> PagedLayers | State:
    if isinstance(spec, MambaSpec):
        return State(layers, (StatePart(1, spec.page_size_bytes, 1),))
    window = None
    if isinstance(spec, SlidingWindowSpec):
        window = spec.sliding_window
    elif isinstance(spec, ChunkedLocalAttentionSpec):
        window = spec.attention_chunk_size
    return PagedLayers(layers, spec.page_size_bytes, spec.block_size, window)
