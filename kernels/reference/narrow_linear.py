"""Products of fp8 or int8 with fp8 or int8, in fp32 over the numbers that they stand for."""

from __future__ import annotations

import torch

from .quantized import dequantized, expanded, quantized_tokens


def ways(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> list[str]:
    return [""]


def narrow_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    row_block: int,
    group_len: int,
    way: str = "",
) -> torch.Tensor:
    """See kernels/narrow_linear.py."""
    blocked = scales.shape[1] > 1
    tokens, token_scales = quantized_tokens(x, weight.dtype, group_len if blocked else x.shape[1])
    wide = tokens.float() * expanded(token_scales, tokens.shape, 1, group_len)
    out = wide @ dequantized(weight, scales, None, row_block, group_len).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)
