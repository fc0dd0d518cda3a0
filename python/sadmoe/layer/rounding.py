"""Weights of experts as int8 times scales, such that casting a scale loses nothing of it."""

import torch
from torch import Tensor

SMALLEST_COLUMN = 2.0**-14  # scale of a column beside the largest, 1: what float16 holds


def to_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight float32 [E, s, n] -> int8 of its shape, and the scale [E, s] of every neuron, of that dtype: 127 steps to
    each side of 0, up to the neuron's largest weight."""
    scale = _up_to(dtype, _up_to_bfloat16(weight.abs().amax(-1) / 127))
    divisor = scale.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return (weight / divisor).round().clamp(-127, 127).to(torch.int8), scale


def column_scales(weight: Tensor) -> Tensor:
    """Of every column of weight [E, s, n], float32: the largest power of two up to its entries, over the largest of all
    columns, and no less than SMALLEST_COLUMN."""
    largest = weight.abs().amax((0, 1))
    powers = (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(2.0**-100, 2.0**100)
    return (powers / powers.max()).clamp(min=SMALLEST_COLUMN)


def _up_to_bfloat16(x: Tensor) -> Tensor:
    """The smallest bfloat16 values that are not below x >= 0, in float32; NaN stays so."""
    bits = (x.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return bits.view(torch.float32).where(x.isfinite(), x)


def _up_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """The smallest values of the dtype that are not below x >= 0: float16 has few below 6e-5."""
    near = x.to(dtype)
    return near.where(near.float() >= x, near.nextafter(torch.full_like(near, torch.inf)))  # of NaN NaN
