from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.codecs.page import AXES, CPU_ATTENTION, PLAIN, Dtype, Layout, PageShape, Region
from kv.errors import CodecError

# vLLM's other order on GPUs: a head's token has its key, then its value.
INTERLEAVED = Layout("LHT", "D", "D")
LAYOUTS = (CPU_ATTENTION, PLAIN, INTERLEAVED)
AXIS = st.integers(1, 4)


def _positions(shape: PageShape, region: Region) -> list[int]:
    ranges = [range(size) for size in shape.sizes(AXES)]
    return [
        region.offset + sum(i * stride for i, stride in zip(index, region.strides, strict=True))
        for index in product(*ranges)
    ]


@given(AXIS, AXIS, AXIS, AXIS, st.sampled_from(LAYOUTS))
def test_keys_and_values_tile_a_page(
    layers: int, tokens: int, kv_heads: int, head_dim: int, layout: Layout
) -> None:
    """Each number of a page is one key or one value: none twice, none left out."""
    shape = PageShape(layers, tokens, kv_heads, head_dim, Dtype.FP16, layout)
    positions = _positions(shape, shape.keys) + _positions(shape, shape.values)
    assert sorted(positions) == list(range(2 * shape.region_elements))
    assert shape.page_bytes == 2 * len(positions)


def test_the_cpu_layout_is_what_vllm_writes() -> None:
    """Per layer and head: keys with a channel's tokens side by side, then values with a token's
    channels side by side (cpu_attn_reshape_and_cache, ISAs vec and vec16)."""
    shape = PageShape(layers=2, tokens=32, kv_heads=3, head_dim=64)
    head = 2 * 32 * 64
    assert shape.keys == Region(0, (3 * head, head, 1, 32))
    assert shape.values == Region(32 * 64, (3 * head, head, 64, 1))


@pytest.mark.parametrize(
    ("outer", "keys", "values"),
    [("L", "HT", "HT"), ("LH", "DTT", "TD"), ("LH", "TD", "TX"), ("", "LHTD", "LHT")],
)
def test_a_layout_names_each_axis_once(outer: str, keys: str, values: str) -> None:
    """An order that leaves an axis out or has one twice would read other numbers."""
    with pytest.raises(CodecError, match="name each axis once"):
        Layout(outer, keys, values)


@pytest.mark.parametrize("axes", [{"layers": 0}, {"tokens": 0}, {"kv_heads": -1}, {"head_dim": 0}])
def test_an_empty_page_is_refused(axes: dict[str, int]) -> None:
    """There is nothing to store of a page without numbers."""
    with pytest.raises(CodecError, match="give each axis at least 1"):
        PageShape(**{"layers": 1, "tokens": 1, "kv_heads": 1, "head_dim": 1, **axes})


def test_a_fingerprint_tells_every_difference() -> None:
    """Shapes of equal size, other number types of equal size and other layouts are other pages."""
    shapes = [
        PageShape(*axes, dtype, layout)
        for axes in ((2, 32, 4, 8), (4, 32, 2, 8), (2, 4, 32, 8), (2, 32, 8, 4))
        for dtype in Dtype
        for layout in LAYOUTS
    ]
    assert len({shape.fingerprint for shape in shapes}) == len(shapes)
