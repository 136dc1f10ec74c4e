"""Every codec by its name."""

from collections.abc import Mapping
from types import MappingProxyType

from kv.codecs.cast import Cast
from kv.codecs.codec import Codec
from kv.codecs.int8 import Int8
from kv.codecs.page import Dtype
from kv.codecs.raw import Raw
from kv.codecs.tq4 import Tq4

_ALL: tuple[Codec, ...] = (Raw(), Cast(Dtype.FP16), Cast(Dtype.BF16), Int8(), Tq4())

CODECS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in _ALL})
# What a request that opted into nothing may read.
LOSSLESS: Mapping[str, Codec] = MappingProxyType(
    {codec.name: codec for codec in _ALL if codec.lossless}
)
