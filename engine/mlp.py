"""The MLP of a layer: gated and dense, or a mixture of such as experts.

dense      x ─► gate, up ─► silu(gate) · up ─► down
mixture    x ─► router ─► a few experts and their weights ─► each expert's gated MLP ─► their weighted sum

A rank of a tensor-parallel group has a part of the width, of every expert too; what it returns is a term of the sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..kernels.experts import experts, route
from ..kernels.linear import linear
from .linears import Linear


@dataclass(frozen=True, slots=True)
class DenseMLP:
    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size], as x."""
        return self.down(self.gate_up.gated(x))

    def linears(self) -> dict[str, Linear]:
        return {"gate_up": self.gate_up, "down": self.down}

    def tensors(self) -> Iterator[torch.Tensor]:
        for each in (self.gate_up, self.down):
            yield from each.tensors()


@dataclass(frozen=True, slots=True)
class MixtureMLP:
    router: torch.Tensor
    """[num_experts, hidden_size]: the same on every rank."""
    gate_up: torch.Tensor
    """[num_experts, 2 * width, hidden_size], gate first."""
    down: torch.Tensor
    """[num_experts, hidden_size, width]."""
    num_experts_per_token: int
    is_normalized: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size], as x."""
        weights, chosen = route(linear(x, self.router), self.num_experts_per_token, self.is_normalized)
        return experts(x, self.gate_up, self.down, weights, chosen)

    def linears(self) -> dict[str, Linear]:
        """None: experts are not quantised."""
        return {}

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.router, self.gate_up, self.down)
