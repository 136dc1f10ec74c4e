"""8 bits a number in groups of up to 32, with a step and a centre for each group.

Keys are grouped along tokens, each channel of a head for itself, because single channels of keys
are far larger than others; values along the channels of one token's head. On real keys a centre is
worth 4.3 dB, on values 1.6, for half a bit a number (docs/decisions/0010-codecs.md).
"""

from collections.abc import Iterator

import torch

from kv.codecs.codec import Bytes, CodecName, Writable
from kv.codecs.groups import PARAMETERS, from_steps, group_size, into_steps
from kv.codecs.page import PageShape
from kv.codecs.tensors import (
    TORCH_DTYPES,
    layer_runs,
    load,
    region,
    sections,
    sections_bytes,
    store,
    tensor,
)

LEVELS = 256

# Numbers as they lie in the page, (layers, heads, rows, axis of a group); their steps, centres and
# codes, (layers, elements of a layer).
_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Int8:
    """Takes any shape. Refuses NaN, infinity and magnitudes above 2^50; nothing saturates."""

    name = CodecName.INT8
    lossless = False

    def encoded_bytes(self, shape: PageShape) -> int:
        return sections_bytes(shape.layers, _sections(shape))

    def encode(self, page: Bytes, shape: PageShape, payload: Writable) -> None:
        for numbers, step, centre, codes in _runs(page, payload, shape):
            groups = load(numbers).view(step.numel(), -1)
            into_steps(self.name, groups, LEVELS, step, centre)
            codes.copy_(groups.floor_().view(codes.shape))

    def decode(self, payload: Bytes, shape: PageShape, page: Writable) -> None:
        for numbers, step, centre, codes in _runs(page, payload, shape):
            groups = load(codes).add_(0.5).view(step.numel(), -1)
            from_steps(groups, step, centre)
            store(groups, numbers)


def _sections(shape: PageShape) -> list[tuple[int, torch.dtype]]:
    """Steps and centres of keys, of values, then codes of keys, of values; for one layer."""
    numbers = shape.region_elements // shape.layers
    of_keys = numbers // group_size(shape.tokens)
    of_values = numbers // group_size(shape.head_dim)
    parameters = [(count, PARAMETERS) for count in (of_keys, of_keys, of_values, of_values)]
    return [*parameters, (numbers, torch.int8), (numbers, torch.int8)]


def _runs(page: Bytes, payload: Bytes, shape: PageShape) -> Iterator[_Parts]:
    flat = tensor(page, TORCH_DTYPES[shape.dtype])
    keys = region(flat, shape, shape.keys, "LHDT")
    values = region(flat, shape, shape.values, "LHTD")
    parts = sections(payload, shape.layers, _sections(shape))
    key_step, key_centre, value_step, value_centre, key_codes, value_codes = parts
    for run in layer_runs(shape):
        yield keys[run], key_step[run], key_centre[run], key_codes[run]
        yield values[run], value_step[run], value_centre[run], value_codes[run]
