"""Makes quantised matrices from 16- or 32-bit ones, to the nearest."""

from __future__ import annotations

import torch

from ..kernels.reference.quantized import quantized_tokens
from .linears import IN_A_WORD, Int4Linear, Linear, NarrowLinear
from .quantization import Kind, int4_group

NARROW = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
INT4_MAX = 15


def quantize(weight: torch.Tensor, kind: Kind) -> Linear:
    """weight [out, in]; without a bias. fp8 and int8 by channel; int4 with zero points, scales in weight's dtype."""
    if kind != "int4":
        numbers, scales = quantized_tokens(weight, NARROW[kind], weight.shape[1])
        return NarrowLinear(weight=numbers, scales=scales, group_len=weight.shape[1])
    return _int4(weight)


def _int4(weight: torch.Tensor) -> Int4Linear:
    group_len = int4_group(weight.shape[1])
    grouped = weight.float().unflatten(1, (-1, group_len))
    # 0 is a number, so that a group on one side of it has a zero point within 0 to 15
    low, high = grouped.amin(dim=2).clamp(max=0.0), grouped.amax(dim=2).clamp(min=0.0)
    tiny = torch.finfo(weight.dtype).tiny
    scales = ((high - low) / INT4_MAX).clamp(min=tiny).to(weight.dtype)
    step = scales.float()
    zeros = (-low / step).round().clamp(0, INT4_MAX)
    numbers = ((grouped / step.unsqueeze(2)).round() + zeros.unsqueeze(2)).clamp(0, INT4_MAX)
    return Int4Linear(
        weight=packed_int4(numbers.flatten(1).to(torch.int32)), scales=scales, zeros=zeros.to(torch.uint8), group_len=group_len
    )


def packed_int4(numbers: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns] of 0 to 15 -> int32 [rows, columns / 8], the first column in the lowest four bits."""
    words = numbers.unflatten(1, (-1, IN_A_WORD))
    out = words[:, :, 0].clone()
    for index in range(1, IN_A_WORD):
        out |= words[:, :, index] << (4 * index)
    return out
