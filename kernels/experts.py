"""A mixture of experts: which of them a token is given, and the sum of their gated MLPs.

router's logits ─► softmax in fp32 ─► the largest top_k ─► weights, chosen
x ─► gate_up of the chosen ─► silu(gate) · up ─► down of the chosen ─► times the weight ─► summed over a token's experts
"""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import experts as reference


def route(logits: torch.Tensor, top_k: int, is_normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [num_tokens, num_experts]; weights fp32 and chosen int64, both [num_tokens, top_k], the largest first.

    Weights are the softmax over all experts; is_normalized: divided by their sum. Equal ones are chosen as torch.topk does.
    """
    weights, chosen = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True) if is_normalized else weights), chosen


def experts(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """x [num_tokens, hidden], gate_up [num_experts, 2 * width, hidden], down [num_experts, hidden, width], weights fp32 and chosen, both
    [num_tokens, top_k]; out [num_tokens, hidden] in x's dtype. A token has each expert at most once."""
    if x.is_cuda:
        return implementation("experts", x.device)(x, gate_up, down, weights, chosen)
    return reference.experts(x, gate_up, down, weights, chosen)
