"""RMS norm in torch:  y = x / sqrt(mean(x²) + eps) · weight  (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Over the last dimension, computed in fp32, rounded once.

    residual: added to x before; then the sum, in x's dtype, is returned beside the norm and is what is normalised.
    """
    if residual is not None:
        x = x + residual
    # torch.rms_norm upcasts inside where weight and input are half precision
    out = torch.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)
    return out if residual is None else (out, x)
