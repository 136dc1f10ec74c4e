"""The lossless codec: the bytes as they are, whatever they mean."""

from kv.codecs.codec import Bytes, CodecName, Writable
from kv.codecs.page import PageShape


class Raw:
    """Looks at no layout and no number, so NaNs keep their payload bits and zeros their sign."""

    name = CodecName.RAW
    lossless = True

    def encoded_bytes(self, shape: PageShape) -> int:
        return shape.page_bytes

    def encode(self, page: Bytes, shape: PageShape, payload: Writable) -> None:
        payload[:] = page

    def decode(self, payload: Bytes, shape: PageShape, page: Writable) -> None:
        page[:] = payload
