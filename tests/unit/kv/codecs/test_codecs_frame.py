import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kv.codecs.codec import Codec, CodecName
from kv.codecs.frame import (
    HEADER_BYTES,
    VERSION,
    decode_frame,
    encode_frame,
    frame_bytes,
    read_frame,
)
from kv.codecs.page import PLAIN, Dtype, Layout, PageShape
from kv.codecs.table import CODECS, LOSSLESS
from kv.errors import CodecError

ROOT = Path(__file__).resolve().parents[4]
SHAPE = PageShape(layers=2, tokens=4, kv_heads=1, head_dim=8)
RAW = CODECS[CodecName.RAW]
EVERY_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def scattered(shape: PageShape) -> bytes:
    """A page of fp32 numbers in [-4, 4) that look random and are the same on every machine."""
    position = np.arange(2 * shape.region_elements, dtype=np.uint64)
    # Knuth's multiplicative hash.
    hashed = position * np.uint64(2_654_435_761) % np.uint64(2**32)
    return (hashed / 2**29 - 4).astype(np.float32).tobytes()


def framed(codec: Codec, shape: PageShape = SHAPE) -> bytearray:
    frame = bytearray(frame_bytes(codec, shape))
    encode_frame(codec, scattered(shape), shape, frame)
    return frame


@EVERY_CODEC
def test_a_frame_says_what_it_is(codec: Codec) -> None:
    """A frame is read and verified without knowing its shape or loading its codec."""
    found = read_frame(framed(codec))
    assert (found.codec, found.fingerprint) == (codec.name, SHAPE.fingerprint)
    assert len(found.payload) == codec.encoded_bytes(SHAPE)


@EVERY_CODEC
def test_any_damaged_byte_is_caught(codec: Codec) -> None:
    """Whichever byte of a frame changes, reading refuses it and the page stays as it was."""
    frame, page = framed(codec), bytearray(b"\xaa" * SHAPE.page_bytes)
    for position in range(len(frame)):
        for change in (0x01, 0x80, 0xFF):
            frame[position] ^= change
            with pytest.raises(CodecError):
                decode_frame(frame, SHAPE, CODECS, page)
            frame[position] ^= change
    assert page == b"\xaa" * SHAPE.page_bytes
    assert decode_frame(frame, SHAPE, CODECS, page) == codec.name


@EVERY_CODEC
def test_a_frame_of_any_other_length_is_caught(codec: Codec) -> None:
    """Cut short anywhere, down to nothing, or with something behind it."""
    frame, page = framed(codec), bytearray(SHAPE.page_bytes)
    for length in range(len(frame)):
        with pytest.raises(CodecError, match="compute it anew"):
            decode_frame(frame[:length], SHAPE, CODECS, page)
    with pytest.raises(CodecError, match="its header says"):
        decode_frame(frame + b"\0", SHAPE, CODECS, page)


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_frame_are_refused(junk: bytes) -> None:
    """Whatever a tier answers, what does not verify is an error of ours."""
    with pytest.raises(CodecError):
        read_frame(junk)


@pytest.mark.parametrize(
    "other",
    [
        PageShape(layers=1, tokens=8, kv_heads=1, head_dim=8),
        PageShape(layers=2, tokens=4, kv_heads=1, head_dim=8, layout=PLAIN),
        PageShape(layers=2, tokens=8, kv_heads=1, head_dim=8, dtype=Dtype.FP16),
    ],
    ids=str,
)
@EVERY_CODEC
def test_a_page_of_another_shape_is_never_filled(codec: Codec, other: PageShape) -> None:
    """A fingerprint keeps pages of equal size apart."""
    page = bytearray(other.page_bytes)
    with pytest.raises(CodecError, match="is not of layers="):
        decode_frame(framed(codec), other, CODECS, page)
    assert not any(page)


@pytest.mark.parametrize("name", [name for name in CODECS if name not in LOSSLESS])
def test_a_lossless_reader_takes_no_lossy_frame(name: str) -> None:
    """A frame that was put under a lossless name by mistake is still not read."""
    page = bytearray(SHAPE.page_bytes)
    with pytest.raises(CodecError, match="raw accepted"):
        decode_frame(framed(CODECS[name]), SHAPE, LOSSLESS, page)
    assert not any(page)


def test_frames_and_gates_do_without_torch() -> None:
    """A router and a vault verify and decide; torch would cost them seconds and memory."""
    program = "import sys, kv.codecs.frame, kv.codecs.gate; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_frame_of_another_version_is_refused() -> None:
    """A later version may have other payloads; a right checksum does not help it."""
    frame = framed(RAW)
    frame[4] = VERSION + 1
    frame[56:64] = xxh3_64_intdigest(bytes(frame[:56] + frame[64:])).to_bytes(8, "little")
    with pytest.raises(CodecError, match=f"version {VERSION + 1}"):
        read_frame(frame)


def test_a_checksum_covers_header_and_payload() -> None:
    """The form is as documented: others can verify it with xxh3_64 alone."""
    frame = framed(RAW)
    whole = bytes(frame[:56] + frame[HEADER_BYTES:])
    assert frame[56:64] == xxh3_64_intdigest(whole).to_bytes(8, "little")
    assert (frame[:4], frame[8:16]) == (b"BEKV", b"raw\0\0\0\0\0")


def test_what_a_codec_refuses_leaves_no_frame() -> None:
    """A buffer that held a frame before does not keep its header over another payload."""
    frame = framed(CODECS[CodecName.INT8])
    nan = b"\xff" * SHAPE.page_bytes
    with pytest.raises(CodecError, match="store it raw"):
        encode_frame(CODECS[CodecName.INT8], nan, SHAPE, frame)
    with pytest.raises(CodecError, match="magic"):
        read_frame(frame)


@EVERY_CODEC
def test_buffers_of_another_size_are_refused(codec: Codec) -> None:
    """Nothing is written behind a buffer's end, and no page is taken for a longer one."""
    page, frame = scattered(SHAPE), framed(codec)
    for short in (page[:-4], b""):
        with pytest.raises(CodecError, match="give a buffer of that size"):
            encode_frame(codec, short, SHAPE, frame)
    with pytest.raises(CodecError, match="give a buffer of that size"):
        encode_frame(codec, page, SHAPE, frame[:-1])
    with pytest.raises(CodecError, match="give a buffer of that size"):
        decode_frame(framed(codec), SHAPE, CODECS, bytearray(SHAPE.page_bytes + 4))


@EVERY_CODEC
def test_views_inside_larger_buffers_are_read_and_written(codec: Codec) -> None:
    """Tiers hold pages and frames in one shared memory: at any offset the bytes are the same."""
    frame = framed(codec)
    region = bytearray(3 + SHAPE.page_bytes + 5)
    view = memoryview(region)[3:-5]
    decode_frame(bytes(frame), SHAPE, CODECS, view)
    page = bytearray(SHAPE.page_bytes)
    decode_frame(memoryview(frame).toreadonly(), SHAPE, CODECS, page)
    assert view == page
    assert (region[:3], region[-5:]) == (bytes(3), bytes(5))


def test_every_name_has_its_codec() -> None:
    """The names that configs may give and the table are the same, and fit in a header."""
    assert list(CODECS) == list(CodecName)
    assert all(codec.name == name and len(name) <= 8 for name, codec in CODECS.items())
    assert list(LOSSLESS) == [CodecName.RAW]


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("raw", "dc778c72706d4486"),
        ("fp16", "5b87f444a03a8f6d"),
        ("bf16", "9d7ba889afd5d8ef"),
        ("int8", "fc386c5536768e91"),
    ],
)
def test_a_payload_stays_what_it_is(name: str, digest: str) -> None:
    """Frames outlive a process. Whoever changes a payload's bytes raises `VERSION`."""
    shape = PageShape(layers=2, tokens=32, kv_heads=2, head_dim=16)
    frame = framed(CODECS[name], shape)
    assert VERSION == 1
    assert hashlib.sha256(frame).hexdigest()[:16] == digest


def test_tq4s_rotation_and_centroids_stay_what_they_are() -> None:
    """A payload decodes to the same numbers: signs, order of halves and centroids are in them. A
    product of matrices may differ in its last bits from one kind of CPU to another."""
    shape = PageShape(layers=1, tokens=1, kv_heads=1, head_dim=4)
    # bf16 1.0 for each of 4 steps, 4 centres and 1 scale; then codes 0, 1, .. of keys and values.
    payload = b"\x80\x3f" * 9 + bytes.fromhex("1032 6475")
    page = bytearray(shape.page_bytes)
    CODECS[CodecName.TQ4].decode(payload, shape, page)
    numbers = np.frombuffer(page, np.float32)
    assert numbers[:4] == pytest.approx([-6.5, -5.5, -4.5, -3.5])
    # Centroids -0.9423, -0.3880, -0.6568 and -0.1284 by a Hadamard matrix, halved, with signs.
    assert numbers[4:] == pytest.approx([-1.05775, 0.54135, 0.27255, -0.01295], abs=1e-6)


@pytest.mark.parametrize("name", ["int8", "tq4"])
def test_a_layout_does_not_change_a_payload(name: str) -> None:
    """Groups are of the same numbers wherever they lie."""
    layouts = (PLAIN, Layout("LH", "DT", "TD"), Layout("LHT", "D", "D"))
    shape = (2, 2, 32, 16)
    keys, values = np.random.default_rng(7).normal(size=(2, *shape)).astype(np.float32)
    payloads = []
    for layout in layouts:
        page_shape = PageShape(2, 32, 2, 16, layout=layout)
        page = np.empty(2 * page_shape.region_elements, np.float32)
        for numbers, region in ((keys, page_shape.keys), (values, page_shape.values)):
            strides = [4 * stride for stride in region.strides]
            view = np.lib.stride_tricks.as_strided(page[region.offset :], shape, strides)
            view[:] = numbers
        payload = bytearray(CODECS[name].encoded_bytes(page_shape))
        CODECS[name].encode(page.data.cast("B"), page_shape, payload)
        payloads.append(payload)
    assert payloads[0] == payloads[1] == payloads[2]
