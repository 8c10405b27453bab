"""Linear layers, plain and gated. A single token's is bound by reading the weights, and cuBLAS leaves a part of that on the table."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import linear as reference


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [num_tokens, in], weight [out, in], bias [out]; out [num_tokens, out] in x's dtype."""
    if x.is_cuda:
        return implementation("linear", x.device)(x, weight, bias)
    return reference.linear(x, weight, bias)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """silu(gate) · up, where linear(x, weight, bias) is [gate | up]: out [num_tokens, out / 2]. None where no kernel does it in one."""
    if x.is_cuda and len(x) == 1:
        kernel = implementation("linear", x.device)
        return kernel(x, weight, bias, gated=True) if kernel is not reference.linear else None
    return None
