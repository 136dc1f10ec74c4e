"""Frames of any size, as a vault's clients encode them."""

from kv.codecs.frame import HEADER_BYTES, encode_frame
from kv.codecs.page import PageShape
from kv.codecs.raw import Raw


def frame_of(seed: int, n_bytes: int) -> bytes:
    """A raw frame of about `n_bytes`: 64 and a multiple of 8. Other seeds give other bytes."""
    shape = PageShape(
        layers=1, tokens=max(1, (n_bytes - HEADER_BYTES) // 8), kv_heads=1, head_dim=1
    )
    page = (seed.to_bytes(8, "little") * shape.tokens)[: shape.page_bytes]
    frame = bytearray(HEADER_BYTES + shape.page_bytes)
    encode_frame(Raw(), page, shape, frame)
    return bytes(frame)
