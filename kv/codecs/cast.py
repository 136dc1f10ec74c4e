"""fp32 pages as fp16 or bf16: half the bytes, whatever the layout.

fp16 keeps 11 significant bits down to 2^-14 and steps of 2^-24 below; bf16 keeps 8 over fp32's
whole range. Magnitudes that would become infinite are refused, as NaN and infinity are: nothing
saturates.
"""

import torch

from kv.codecs.codec import Bytes, CodecName, Writable
from kv.codecs.page import Dtype, PageShape
from kv.codecs.tensors import CHUNK_ELEMENTS, TORCH_DTYPES, check_finite, tensor
from kv.errors import CodecError


class Cast:
    """A narrower number type; `name` is that type's. A page that is as narrow already is refused:
    a cast would save nothing and could lose something.
    """

    lossless = False

    def __init__(self, dtype: Dtype) -> None:
        self.name = CodecName(dtype.value)
        self._dtype = TORCH_DTYPES[dtype]
        self._limit = torch.finfo(self._dtype).max

    def encoded_bytes(self, shape: PageShape) -> int:
        if shape.dtype is not Dtype.FP32:
            raise CodecError(f"{self.name} of a {shape.dtype} page", "0 bytes saved", "use raw")
        return shape.page_bytes // 2

    def encode(self, page: Bytes, shape: PageShape, payload: Writable) -> None:
        numbers, narrow = tensor(page, torch.float32), tensor(payload, self._dtype)
        chunks = zip(numbers.split(CHUNK_ELEMENTS), narrow.split(CHUNK_ELEMENTS), strict=True)
        for chunk, out in chunks:
            check_finite(self.name, chunk.amin(), chunk.amax(), self._limit)
            out.copy_(chunk)

    def decode(self, payload: Bytes, shape: PageShape, page: Writable) -> None:
        tensor(page, torch.float32).copy_(tensor(payload, self._dtype))
