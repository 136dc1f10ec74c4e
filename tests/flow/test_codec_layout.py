"""Codecs read pages as vLLM's own kernels write them."""

import pytest
import torch
import vllm._C  # noqa: F401  registers the kernels
from vllm import _custom_ops as kernels

from kv.codecs.page import CPU_ATTENTION, Dtype, PageShape
from kv.codecs.table import CODECS
from kv.codecs.tensors import TORCH_DTYPES, region, tensor


def _written(shape: PageShape, keys: torch.Tensor, values: torch.Tensor, isa: str) -> bytearray:
    """A page of one layer, filled by the kernel from keys and values (tokens, heads, channels)."""
    page = bytearray(shape.page_bytes)
    # As vLLM's CPUAttentionBackendImpl splits its cache: one block here.
    cache = tensor(page, TORCH_DTYPES[shape.dtype])
    halves = cache.view(1, shape.kv_heads, shape.tokens * 2, shape.head_dim).chunk(2, dim=2)
    slots = torch.arange(shape.tokens)
    kernels.cpu_attn_reshape_and_cache(
        keys, values, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    return page


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize(
    ("isa", "tokens", "head_dim"),
    [("vec", 32, 64), ("vec", 64, 32), ("vec", 128, 128), ("vec16", 32, 80)],
)
def test_keys_and_values_lie_where_the_cpu_layout_says(
    isa: str, tokens: int, head_dim: int, dtype: Dtype
) -> None:
    """Whatever vLLM's kernel writes into a block is found by token, head and channel, and int8
    brings it back close."""
    shape = PageShape(1, tokens, 3, head_dim, dtype, CPU_ATTENTION)
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, tokens, 3, head_dim, generator=generator).to(TORCH_DTYPES[dtype])
    page = _written(shape, keys, values, isa)
    payload = bytearray(CODECS["int8"].encoded_bytes(shape))
    CODECS["int8"].encode(page, shape, payload)
    restored = bytearray(shape.page_bytes)
    CODECS["int8"].decode(payload, shape, restored)
    for numbers, where in ((keys, shape.keys), (values, shape.values)):
        found = region(tensor(page, numbers.dtype), shape, where, "THLD").squeeze(2)
        assert torch.equal(found, numbers)
        close = region(tensor(restored, numbers.dtype), shape, where, "THLD").squeeze(2)
        # Half a 255th of at most 10, and bf16's rounding.
        assert torch.allclose(close.float(), numbers.float(), atol=0.04)
