"""What lossy codecs may change, from theory, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kv.codecs import tensors
from kv.codecs.codec import CodecName
from kv.codecs.page import CPU_ATTENTION, PLAIN, Dtype, Layout, PageShape
from kv.codecs.table import CODECS
from kv.errors import CodecError

Floats = NDArray[np.float64]

LOSSY = ("fp16", "bf16", "int8", "tq4")
GROUPED = ("int8", "tq4")
LAYOUTS = st.sampled_from([CPU_ATTENTION, PLAIN])
# One token, odd counts, whole groups, more than a group; one head is MQA.
SHAPES = st.builds(
    PageShape,
    st.integers(1, 3),
    st.sampled_from([1, 2, 7, 31, 32, 33, 48, 64]),
    st.sampled_from([1, 3]),
    st.sampled_from([2, 16, 32, 64]),
    st.just(Dtype.FP32),
    LAYOUTS,
)
SEEDS = st.integers(0, 2**32)
# From numbers whose squares vanish in fp32 to the largest that groups take.
SCALES = st.sampled_from([1e-40, 1e-25, 1e-6, 1.0, 3e4, 1e12])
BF16_ROUNDING = 2.0**-8
FP32_ROUNDING = 2.0**-21  # of a handful of operations


def numbers_of(shape: PageShape, seed: int, scale: float) -> tuple[Floats, Floats]:
    """Keys with channels of their own size and offset, values with outliers: (L, H, T, D)."""
    random = np.random.default_rng(seed)
    size = shape.sizes("LHTD")
    channels = random.normal(size=(2, shape.layers, shape.kv_heads, 1, shape.head_dim))
    keys = random.normal(size=size) * np.exp(channels[0]) + 4 * channels[1]
    values = random.normal(size=size) * np.where(random.random(size) < 0.02, 20, 1)
    return _fp32(keys * scale), _fp32(values * scale)


def _fp32(numbers: Floats) -> Floats:
    return numbers.astype(np.float32).astype(np.float64)


def page_of(shape: PageShape, keys: Floats, values: Floats) -> bytearray:
    page = bytearray(shape.page_bytes)
    flat = tensors.tensor(page, tensors.TORCH_DTYPES[shape.dtype])
    tensors.region(flat, shape, shape.keys, "LHTD").copy_(torch.from_numpy(keys))
    tensors.region(flat, shape, shape.values, "LHTD").copy_(torch.from_numpy(values))
    return page


def numbers_in(page: bytearray, shape: PageShape) -> tuple[Floats, Floats]:
    flat = tensors.tensor(page, tensors.TORCH_DTYPES[shape.dtype])
    keys, values = (
        tensors.region(flat, shape, region, "LHTD").to(torch.float64).numpy()
        for region in (shape.keys, shape.values)
    )
    return keys, values


def restored(name: str, shape: PageShape, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
    codec = CODECS[name]
    payload, page = bytearray(codec.encoded_bytes(shape)), bytearray(shape.page_bytes)
    codec.encode(page_of(shape, keys, values), shape, payload)
    codec.decode(payload, shape, page)
    return numbers_in(page, shape)


def group_bounds(numbers: Floats, axis: int, levels: int) -> Floats:
    """For each number, half its group's step: the group's span and what rounding its centre to
    bf16 adds to that, over the levels, and what rounding the step adds."""
    length = numbers.shape[axis]
    size = next(size for size in range(min(length, 32), 0, -1) if length % size == 0)
    groups = np.moveaxis(numbers, axis, -1).reshape(-1, size)
    low, high = groups.min(1), groups.max(1)
    reach = (high - low) / 2 + BF16_ROUNDING * np.abs(high + low) / 2
    # 2^-99: the least step, and centres that are denormal in bf16.
    half_step = reach / (levels - 1) * (1 + BF16_ROUNDING) + 2.0**-99
    bound = half_step + FP32_ROUNDING * np.abs(groups).max(1)
    shape = np.moveaxis(numbers, axis, -1).shape
    return np.moveaxis(np.broadcast_to(bound[:, None], groups.shape).reshape(shape), -1, axis)


def snr_db(numbers: Floats, found: Floats) -> float:
    return 10 * math.log10(float((numbers**2).sum() / ((numbers - found) ** 2).sum()))


@given(SHAPES, SEEDS, SCALES)
def test_int8_is_within_half_a_step(shape: PageShape, seed: int, scale: float) -> None:
    """Keys are grouped along tokens, values along channels; no number is further off than half of
    its own group's 255th."""
    keys, values = numbers_of(shape, seed, scale)
    found_keys, found_values = restored("int8", shape, keys, values)
    assert (np.abs(found_keys - keys) <= group_bounds(keys, 2, 256)).all()
    assert (np.abs(found_values - values) <= group_bounds(values, 3, 256)).all()


@given(SHAPES, SEEDS, SCALES)
def test_tq4_keys_are_within_half_a_step(shape: PageShape, seed: int, scale: float) -> None:
    """As int8's, with 15 steps."""
    keys, values = numbers_of(shape, seed, scale)
    found, _ = restored("tq4", shape, keys, values)
    assert (np.abs(found - keys) <= group_bounds(keys, 2, 16)).all()


@given(SHAPES, SEEDS, st.sampled_from([1e-6, 1.0, 3e4, 1e12]))
def test_tq4_values_keep_their_norm(shape: PageShape, seed: int, scale: float) -> None:
    """A token's value vector of one head is as long as it was, but for bf16's rounding."""
    keys, values = numbers_of(shape, seed, scale)
    _, found = restored("tq4", shape, keys, values)
    norms, found_norms = np.linalg.norm(values, axis=-1), np.linalg.norm(found, axis=-1)
    assert np.allclose(found_norms, norms, rtol=BF16_ROUNDING + FP32_ROUNDING)


@given(SHAPES, SEEDS, st.sampled_from([1e-40, 1e-6, 1.0, 100.0]))
def test_casts_are_within_their_types_rounding(shape: PageShape, seed: int, scale: float) -> None:
    """fp16: half a unit of 11 bits, or of 2^-24 below 2^-14; bf16: half a unit of 8 bits."""
    numbers = numbers_of(shape, seed, scale)
    for name, relative, absolute in (("fp16", 2.0**-11, 2.0**-25), ("bf16", 2.0**-8, 2.0**-134)):
        for before, after in zip(numbers, restored(name, shape, *numbers), strict=True):
            assert (np.abs(after - before) <= relative * np.abs(before) + absolute).all()


def test_normal_values_lose_what_theory_says() -> None:
    """16 Lloyd-Max levels leave 0.0095 of a normal variable's variance; keeping each vector's norm
    helps a little, and 256 values a vector are still not many."""
    shape = PageShape(layers=8, tokens=64, kv_heads=4, head_dim=128)
    normal = np.random.default_rng(3).normal(size=(2, *shape.sizes("LHTD")))
    _, found = restored("tq4", shape, _fp32(normal[0]), _fp32(normal[1]))
    assert 0.0088 < ((found - normal[1]) ** 2).mean() < 0.0097


def test_rotation_takes_the_harm_out_of_outliers() -> None:
    """One channel of values that is 50 times the others leaves those as exact, against the vector's
    norm, as they are without it."""
    shape = PageShape(layers=4, tokens=64, kv_heads=2, head_dim=64)
    keys, values = np.random.default_rng(4).normal(size=(2, *shape.sizes("LHTD")))
    values[..., 5] *= 50
    _, found = restored("tq4", shape, _fp32(keys), _fp32(values))
    assert snr_db(values, found) > 19.5


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("constant", [0.0, 1.0, -300.0, 1e-30, 2.0**50])
def test_constant_channels_stay_nearly_so(name: str, constant: float) -> None:
    """A group without a span has no step to speak of: only the centre's rounding is left to it."""
    shape = PageShape(layers=1, tokens=32, kv_heads=1, head_dim=16)
    keys = np.full(shape.sizes("LHTD"), constant)
    found, values = restored(name, shape, _fp32(keys), np.zeros_like(keys))
    assert (np.abs(found - _fp32(keys)) <= group_bounds(_fp32(keys), 2, 16)).all()
    assert not np.abs(values).max() > 2.0**-90


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("region", [0, 1])
def test_what_is_no_number_is_refused(name: str, bad: float, region: int) -> None:
    """One NaN or infinity anywhere, among keys or values: the caller stores the page raw."""
    shape = PageShape(layers=2, tokens=32, kv_heads=2, head_dim=16)
    numbers = numbers_of(shape, 1, 1.0)
    numbers[region][1, 1, 17, 3] = bad
    with pytest.raises(CodecError, match="store it raw"):
        restored(name, shape, *numbers)


@pytest.mark.parametrize(
    ("name", "fits", "too_large"),
    [
        ("fp16", 65_504.0, 1e6),
        ("bf16", 3.3895e38, 3.4e38),
        ("int8", 2.0**50, 2.0**51),
        ("tq4", 2.0**50, 2.0**51),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_magnitudes_that_do_not_fit_are_refused(
    name: str, fits: float, too_large: float, sign: int
) -> None:
    """Nothing saturates and nothing becomes infinite: 1e6 as fp16 is an error."""
    shape = PageShape(layers=1, tokens=4, kv_heads=1, head_dim=4)
    keys, values = np.zeros((2, *shape.sizes("LHTD")))
    values[0, 0, 2, 1] = _fp32(np.array(fits * sign))
    _, found = restored(name, shape, keys, values)
    assert np.isfinite(found).all()
    assert found[0, 0, 2, 1] == pytest.approx(fits * sign, rel=0.15)
    values[0, 0, 2, 1] = too_large * sign
    with pytest.raises(CodecError, match="store it raw"):
        restored(name, shape, keys, values)


@pytest.mark.parametrize("name", GROUPED)
def test_the_largest_fp16_numbers_stay_finite(name: str) -> None:
    """Half a step above the largest fp16 there is only infinity: there, decoding stops at it."""
    shape = PageShape(layers=1, tokens=32, kv_heads=1, head_dim=64, dtype=Dtype.FP16)
    random = np.random.default_rng(5)
    keys, values = random.choice([65_504.0, -65_504.0, 60_000.0], (2, *shape.sizes("LHTD")))
    for found in restored(name, shape, keys, values):
        assert np.isfinite(found).all()


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP16])
def test_pages_of_two_bytes_are_grouped_too(name: str, dtype: Dtype) -> None:
    """As good as of fp32, and smaller than the page."""
    shape = PageShape(layers=2, tokens=32, kv_heads=2, head_dim=64, dtype=dtype)
    keys, values = numbers_of(shape, 2, 1.0)
    found_keys, found_values = restored(name, shape, keys, values)
    least_db = 38 if name == "int8" else 19
    assert snr_db(keys, found_keys) > least_db
    assert snr_db(values, found_values) > least_db
    assert CODECS[name].encoded_bytes(shape) < 0.6 * shape.page_bytes


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP16])
def test_a_cast_that_saves_nothing_is_refused(name: str, dtype: Dtype) -> None:
    """A page of 2-byte numbers is not made another one of 2-byte numbers."""
    with pytest.raises(CodecError, match="use raw"):
        CODECS[name].encoded_bytes(PageShape(1, 32, 1, 64, dtype))


@pytest.mark.parametrize("head_dim", [1, 3, 80, 96, 112, 192])
def test_tq4_refuses_heads_without_a_hadamard_matrix(head_dim: int) -> None:
    """Known from the shape, before anything is stored; int8 takes such heads."""
    shape = PageShape(layers=1, tokens=32, kv_heads=2, head_dim=head_dim)
    with pytest.raises(CodecError, match=f"head_dim {head_dim} is no power of two; use int8"):
        CODECS[CodecName.TQ4].encoded_bytes(shape)
    keys, values = numbers_of(shape, 6, 1.0)
    found, _ = restored("int8", shape, keys, values)
    assert (np.abs(found - keys) <= group_bounds(keys, 2, 256)).all()


def test_encoded_sizes_are_those_of_the_formats() -> None:
    """The default model's block: int8 28.1 % of fp32 (8 bits and 2 bf16 in 32 numbers), tq4 14.5 %
    (keys 5 bits, values 4.25)."""
    shape = PageShape(layers=30, tokens=32, kv_heads=3, head_dim=64)
    ratios = {
        name: CODECS[name].encoded_bytes(shape) / shape.page_bytes for name in ("raw", *LOSSY)
    }
    expected = {"raw": 1, "fp16": 0.5, "bf16": 0.5, "int8": 9 / 32, "tq4": (5 + 4.25) / 64}
    assert ratios == expected


@pytest.mark.parametrize("name", LOSSY)
def test_the_same_page_gives_the_same_payload(name: str) -> None:
    """Encoding again, into a buffer with something else in it, gives the same bytes."""
    shape = PageShape(layers=3, tokens=32, kv_heads=3, head_dim=64)
    page = page_of(shape, *numbers_of(shape, 8, 1.0))
    before = bytes(page)
    payloads = [bytearray([fill]) * CODECS[name].encoded_bytes(shape) for fill in (0, 0xFF)]
    for payload in payloads:
        CODECS[name].encode(page, shape, payload)
    assert payloads[0] == payloads[1]
    assert page == before


@pytest.mark.parametrize("layout", [CPU_ATTENTION, PLAIN, Layout("LHT", "D", "D")])
@pytest.mark.parametrize("name", LOSSY)
def test_long_pages_are_done_in_runs(
    name: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many layers are done at once changes nothing."""
    shape = PageShape(layers=5, tokens=32, kv_heads=2, head_dim=16, layout=layout)
    numbers = numbers_of(shape, 9, 1.0)
    whole = restored(name, shape, *numbers)
    for layers in (0.5, 2):
        monkeypatch.setattr(
            tensors, "CHUNK_ELEMENTS", int(layers * shape.region_elements // shape.layers)
        )
        for found, expected in zip(restored(name, shape, *numbers), whole, strict=True):
            assert np.allclose(found, expected, rtol=1e-5)
