import struct

from hypothesis import given
from hypothesis import strategies as st

from kv.codecs.frame import decode_frame, encode_frame, frame_bytes
from kv.codecs.page import PLAIN, Dtype, PageShape
from kv.codecs.raw import Raw
from kv.codecs.table import LOSSLESS

# As fp32: a signalling and a quiet NaN with payload bits, infinities, -0.0, denormals.
ODD_WORDS = (0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x807FFFFF)


@given(st.data(), st.sampled_from(Dtype), st.integers(1, 3), st.integers(1, 5))
def test_raw_gives_back_every_bit(
    data: st.DataObject, dtype: Dtype, layers: int, tokens: int
) -> None:
    """Any bytes come back, whether they are numbers of the page's type or not."""
    shape = PageShape(layers, tokens, 1, 3, dtype, PLAIN)
    page = data.draw(st.binary(min_size=shape.page_bytes, max_size=shape.page_bytes))
    assert _restored(shape, page) == page


def test_raw_keeps_what_arithmetic_would_not() -> None:
    """NaN payloads, the sign of zero and denormals are bits like others."""
    shape = PageShape(layers=1, tokens=1, kv_heads=1, head_dim=7)
    page = struct.pack("<14I", *ODD_WORDS, *ODD_WORDS)
    assert _restored(shape, page) == page


def _restored(shape: PageShape, page: bytes) -> bytes:
    frame = bytearray(frame_bytes(Raw(), shape))
    encode_frame(Raw(), page, shape, frame)
    restored = bytearray(shape.page_bytes)
    decode_frame(frame, shape, LOSSLESS, restored)
    return bytes(restored)
