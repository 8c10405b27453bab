"""Products with int4 weights, in fp32 over the numbers that they stand for."""

from __future__ import annotations

import torch

from .quantized import dequantized


def int4_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bias: torch.Tensor | None, *, group_len: int
) -> torch.Tensor:
    """See kernels/int4_linear.py."""
    out = x.float() @ dequantized(weight, scales, zeros, 1, group_len).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)
