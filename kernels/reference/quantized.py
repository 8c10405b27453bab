"""Quantised numbers, and the numbers that they stand for: what kernels/narrow_linear.py and kernels/int4_linear.py take."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FP8_MAX = 448.0  # of e4m3
INT8_MAX = 127
INT4_MIDDLE = 8
"""The zero point of symmetric int4."""


def expanded(scales: torch.Tensor, shape: torch.Size, row_block: int, group_len: int) -> torch.Tensor:
    """scales [rows / row_block, groups] as one a number of a matrix of that shape, whose end may cut the last ones short. Where there is
    one group, its column alone."""
    wide = scales.repeat_interleave(group_len, dim=1)[:, : shape[1]] if scales.shape[1] > 1 else scales
    return wide.repeat_interleave(row_block, dim=0)[: shape[0]] if row_block > 1 else wide


def quantized_tokens(x: torch.Tensor, dtype: torch.dtype, group_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [num_tokens, in] as dtype (e4m3 or int8), and fp32 scales [num_tokens, groups]: the largest number of a group becomes the type's.

    group_len: inputs that share a scale; at least in: one scale a token.
    """
    num_tokens, num_in = x.shape
    wide = x.float()
    num_groups = max(1, -(-num_in // group_len))
    padded = F.pad(wide, (0, num_groups * group_len - num_in)) if num_groups > 1 else wide
    limit = INT8_MAX if dtype == torch.int8 else FP8_MAX
    scales = padded.view(num_tokens, num_groups, -1).abs().amax(dim=2).clamp(min=torch.finfo(torch.float32).tiny * limit) / limit
    scaled = wide / expanded(scales, x.shape, 1, group_len)
    return (scaled.round() if dtype == torch.int8 else scaled).clamp(-limit, limit).to(dtype), scales


def int4_numbers(packed: torch.Tensor) -> torch.Tensor:
    """packed int32 [rows, columns / 8] -> int32 [rows, columns] of 0 to 15: the lowest four bits are the first column."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & 15).flatten(1)


def dequantized(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, row_block: int, group_len: int) -> torch.Tensor:
    """fp32 [out, in]: of int4 where weight is int32, else of e4m3 or int8, which have no zeros."""
    if weight.dtype != torch.int32:
        return weight.float() * expanded(scales.float(), weight.shape, row_block, group_len)
    numbers = int4_numbers(weight)
    middle = INT4_MIDDLE if zeros is None else expanded(zeros.int(), numbers.shape, row_block, group_len)
    return (numbers - middle).float() * expanded(scales.float(), numbers.shape, row_block, group_len)
