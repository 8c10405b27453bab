"""The gated MLP's activation: silu(gate) · up."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import silu_mul as reference


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [num_tokens, 2 * intermediate], gate first; out [num_tokens, intermediate] of the same dtype."""
    if gate_up.is_cuda:
        return implementation("silu_mul", gate_up.device)(gate_up)
    return reference.silu_mul(gate_up)
