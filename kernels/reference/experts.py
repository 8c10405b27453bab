"""A mixture of experts in torch: one after another, those that a token was given."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .silu_mul import silu_mul


def experts(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """See kernels/experts.py. Terms are summed in fp32, in the experts' order."""
    top_k = chosen.shape[1]
    pairs = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(gate_up)).tolist()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, own in enumerate(pairs.split(counts)):
        if len(own):
            tokens = own // top_k
            term = F.linear(silu_mul(F.linear(x[tokens], gate_up[expert])), down[expert])
            out.index_add_(0, tokens, term.float() * weights.flatten()[own].unsqueeze(1))
    return out.to(x.dtype)
