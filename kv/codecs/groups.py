"""Quantization of short groups of numbers to evenly spaced levels around each group's centre.

A level is a whole number of steps and a half away from the centre, on both sides; the outermost
levels are the group's extremes. A number's code is the step that it falls into, so it comes back
within half a step. A group keeps its step and its centre as bf16, which has fp32's range. Both are
rounded before the codes are made, which costs a little of the range and none of that bound: bf16
rounds by at most 2^-8, so a number lies at most 127.5 * (1 + 2^-8) = 127.998 steps from its
centre, and the code is one of 256 without being clamped; likewise 7.53 for 16.
"""

import torch

from kv.codecs.tensors import check_finite

MAX_GROUP = 32
# The least step: a group that spans less becomes constant.
MIN_STEP = 2.0**-100
# Differences and steps stay far within fp32's range.
MAX_MAGNITUDE = 2.0**50
PARAMETERS = torch.bfloat16


def group_size(axis: int) -> int:
    """The largest divisor of an axis that is at most 32, so that every group is full."""
    return next(size for size in range(min(axis, MAX_GROUP), 0, -1) if axis % size == 0)


def into_steps(
    codec: str, numbers: torch.Tensor, levels: int, step: torch.Tensor, centre: torch.Tensor
) -> None:
    """Turns fp32 `numbers` (groups, size) into steps off their group's centre, in place: within
    `levels / 2`. `step` and `centre` take a bf16 for each group.

    Raises CodecError for NaN and magnitudes above MAX_MAGNITUDE.
    """
    low, high = numbers.amin(1), numbers.amax(1)
    check_finite(codec, low, high, MAX_MAGNITUDE)
    centre.view(-1).copy_((low + high).mul_(0.5))
    middle = centre.view(-1).float()
    reach = torch.maximum(high - middle, middle - low)
    step.view(-1).copy_(reach.mul_(2 / (levels - 1)).clamp_(min=MIN_STEP))
    numbers.sub_(middle[:, None]).mul_(step.view(-1, 1).float().reciprocal_())


def from_steps(numbers: torch.Tensor, step: torch.Tensor, centre: torch.Tensor) -> None:
    """Turns steps off the centre back into what they stand for, in place."""
    numbers.mul_(step.view(-1, 1).float()).add_(centre.view(-1, 1).float())
