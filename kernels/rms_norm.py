"""RMS norm, with the residual addition before it where there is one."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import rms_norm as reference


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x and residual [num_tokens, hidden], weight [hidden]; out like x, and x + residual where residual is given."""
    if x.is_cuda:
        return implementation("rms_norm", x.device)(x, weight, eps, residual)
    return reference.rms_norm(x, weight, eps, residual)
