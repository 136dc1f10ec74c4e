"""4 bits a number: keys in groups along tokens, values rotated.

Keys are grouped as in `int8`, with 16 levels. A token's value vector of one head is rotated (random
signs, then a Hadamard matrix), which makes its coordinates about normal whatever they were, and
each takes the nearest of 16 Lloyd-Max centroids of N(0, 1): mean squared error 0.0095 of the
variance. Stored with it is the factor that gives it back its norm, as bf16. After TurboQuant
(arXiv 2504.19874), less its second stage, which costs more than it gives (FACTS.md, "Formulas").
"""

import hashlib
import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from kv.codecs.codec import Bytes, CodecName, Writable
from kv.codecs.groups import (
    MAX_MAGNITUDE,
    PARAMETERS,
    from_steps,
    group_size,
    into_steps,
)
from kv.codecs.page import PageShape
from kv.codecs.tensors import (
    TORCH_DTYPES,
    check_finite,
    layer_runs,
    load,
    region,
    sections,
    sections_bytes,
    store,
    tensor,
)
from kv.errors import CodecError

LEVELS = 16
# Positive halves; FACTS.md, "Formulas".
CENTROIDS = (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326)
# Coordinates are looked up in cells of 1/128: at most that far over a boundary between centroids,
# which costs 0.02 % of the error.
_CELLS, _CELLS_PER_UNIT = 1024, 128
# A shorter vector keeps little but its norm.
_MIN_NORM = 2.0**-60
# Names the signs; another seed is another version of the frame.
_SIGNS = b"breakeven tq4 1"


class _Keys(NamedTuple):
    """Keys as they lie in the page, (layers, heads, channels, tokens), and their payload."""

    numbers: torch.Tensor
    step: torch.Tensor
    centre: torch.Tensor
    codes: torch.Tensor  # two a byte, the first in the low half


class _Values(NamedTuple):
    """Values as they lie in the page, (layers, heads, tokens, channels), and their payload."""

    numbers: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor


class Tq4:
    """Takes heads of a power of two channels, at least 2, and refuses others. Refuses NaN, infinity
    and magnitudes above 2^50; coordinates beyond the outermost centroid become that one.
    """

    name = CodecName.TQ4
    lossless = False

    def encoded_bytes(self, shape: PageShape) -> int:
        return sections_bytes(shape.layers, _sections(shape))

    def encode(self, page: Bytes, shape: PageShape, payload: Writable) -> None:
        for keys, values in _runs(page, payload, shape):
            groups = load(keys.numbers).view(keys.step.numel(), -1)
            into_steps(self.name, groups, LEVELS, keys.step, keys.centre)
            # Truncation of what is above zero is the floor; int8 is torch's fastest way there.
            _pack(groups.add_(LEVELS / 2).to(torch.int8), keys.codes)
            _encode_vectors(load(values.numbers).view(-1, shape.head_dim), values)

    def decode(self, payload: Bytes, shape: PageShape, page: Writable) -> None:
        for keys, values in _runs(page, payload, shape):
            groups = _pairs(_levels(), keys.codes).view(keys.step.numel(), -1)
            from_steps(groups, keys.step, keys.centre)
            store(groups, keys.numbers)
            vectors = _pairs(_centroids(), values.codes).view(-1, shape.head_dim)
            vectors.mul_(values.scale.view(-1, 1).float())
            store(torch.mm(vectors, _rotation(shape.head_dim)), values.numbers)


def _encode_vectors(vectors: torch.Tensor, into: _Values) -> None:
    """Overwrites `vectors` (vectors, channels)."""
    check_finite(Tq4.name, vectors.amin(), vectors.amax(), MAX_MAGNITUDE)
    norm = torch.linalg.vector_norm(vectors, dim=1)
    unit = norm.clamp(min=_MIN_NORM).reciprocal_().mul_(math.sqrt(vectors.shape[1]))
    turned = torch.mm(vectors.mul_(unit[:, None]), _rotation(vectors.shape[1]).T)
    cells = turned.mul_(_CELLS_PER_UNIT).add_(_CELLS / 2).clamp_(0, _CELLS - 1).int().view(-1)
    nearest, code = _cells()
    torch.index_select(nearest, 0, cells, out=vectors.view(-1))
    into.scale.view(-1).copy_(norm / torch.linalg.vector_norm(vectors, dim=1))
    _pack(torch.index_select(code, 0, cells), into.codes)


def _sections(shape: PageShape) -> list[tuple[int, torch.dtype]]:
    """Steps and centres of keys, scales of values, then codes of both; for one layer."""
    if shape.head_dim < 2 or shape.head_dim & (shape.head_dim - 1):
        raise CodecError(
            f"{Tq4.name} of {shape}", f"head_dim {shape.head_dim} is no power of two", "use int8"
        )
    numbers = shape.region_elements // shape.layers
    of_keys, of_values = numbers // group_size(shape.tokens), numbers // shape.head_dim
    parameters = [(count, PARAMETERS) for count in (of_keys, of_keys, of_values)]
    return [*parameters, (numbers // 2, torch.uint8), (numbers // 2, torch.uint8)]


def _runs(page: Bytes, payload: Bytes, shape: PageShape) -> Iterator[tuple[_Keys, _Values]]:
    flat = tensor(page, TORCH_DTYPES[shape.dtype])
    keys = region(flat, shape, shape.keys, "LHDT")
    values = region(flat, shape, shape.values, "LHTD")
    step, centre, scale, key_codes, value_codes = sections(payload, shape.layers, _sections(shape))
    for run in layer_runs(shape):
        yield (
            _Keys(keys[run], step[run], centre[run], key_codes[run]),
            _Values(values[run], scale[run], value_codes[run]),
        )


def _pack(codes: torch.Tensor, packed: torch.Tensor) -> None:
    """Pairs of codes of 4 bits as bytes. The low byte of w | w >> 4 has both halves of w."""
    wide = codes.view(-1).view(torch.int16)
    packed.copy_((wide | wide >> 4).view(packed.shape))


def _pairs(table: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Both numbers of each byte, flat; `table` has the pairs as one float64 each."""
    return torch.index_select(table, 0, packed.reshape(-1).int()).view(torch.float32)


def _pair_table(numbers: torch.Tensor) -> torch.Tensor:
    """What each byte of two codes stands for, the low half first, as 256 float64 of two fp32."""
    low, high = numbers.repeat(16), numbers.repeat_interleave(16)
    return torch.stack([low, high], 1).view(torch.float64).view(-1)


def _both_halves() -> torch.Tensor:
    positive = torch.tensor(CENTROIDS)
    return torch.cat([-positive.flip(0), positive])


@cache
def _levels() -> torch.Tensor:
    return _pair_table(torch.arange(LEVELS) - (LEVELS - 1) / 2)


@cache
def _centroids() -> torch.Tensor:
    return _pair_table(_both_halves())


@cache
def _cells() -> tuple[torch.Tensor, torch.Tensor]:
    """The centroid that is nearest to each cell's middle, and its code."""
    centroids = _both_halves()
    middles = (torch.arange(_CELLS) + 0.5 - _CELLS / 2) / _CELLS_PER_UNIT
    code = torch.bucketize(middles, (centroids[1:] + centroids[:-1]) / 2)
    return centroids[code], code.to(torch.int8)


@cache
def _rotation(channels: int) -> torch.Tensor:
    """The orthogonal matrix by which a column vector is turned."""
    matrix = torch.ones(1, 1)
    while len(matrix) < channels:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    bits = hashlib.shake_256(_SIGNS).digest(channels)
    signs = torch.tensor([1.0 if byte & 1 else -1.0 for byte in bits])
    return matrix * signs / math.sqrt(channels)
