"""What every codec does."""

from enum import StrEnum
from typing import Protocol

from kv.codecs.page import PageShape

# A page or a payload; a memoryview is one of bytes.
Bytes = bytes | bytearray | memoryview
Writable = bytearray | memoryview


class CodecName(StrEnum):
    """Codecs as configs, frames, plans and metrics call them; at most 8 ASCII characters."""

    RAW = "raw"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    TQ4 = "tq4"


class Codec(Protocol):
    """Turns a page into a payload and back; the frame around it is `kv.codecs.frame`'s.

    The same page gives the same payload each time. Codecs keep no state: any thread may use one.
    """

    @property
    def name(self) -> CodecName:
        """What frames call it."""

    @property
    def lossless(self) -> bool:
        """Whether every bit comes back."""

    def encoded_bytes(self, shape: PageShape) -> int:
        """Bytes of a payload. Raises CodecError for a shape that this codec does not take."""

    def encode(self, page: Bytes, shape: PageShape, payload: Writable) -> None:
        """Fill `payload`. Raises CodecError for a page that this codec does not take."""

    def decode(self, payload: Bytes, shape: PageShape, page: Writable) -> None:
        """Fill `page`. The payload is one that `encode` made: the frame's checksum says so."""
