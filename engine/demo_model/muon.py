"""Muon: momentum whose update is made orthogonal, for the matrices of the layers.

    gradient ─► Nesterov momentum ─► 5 Newton-Schulz steps ─► scaled to the size of an AdamW update

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); the scale after Liu et al.,
"Muon is Scalable for LLM Training" (arXiv:2502.16982). Matrices of one shape are updated together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly U Vᵀ of each matrix U S Vᵀ; matrices [n, rows, columns], done in bfloat16 on CUDA."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Updates matrices alone; everything else belongs to AdamW."""

    def __init__(self, matrices: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[tuple(matrix.shape)].append(matrix)
            for shape, matrices in by_shape.items():
                self._update(matrices, group, 0.2 * max(shape) ** 0.5)

    def _update(self, matrices: list[Tensor], group: dict[str, Any], scale: float) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        moments = [self.state[matrix].setdefault("momentum", torch.zeros_like(matrix)) for matrix in matrices]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        ahead = torch.lerp(torch.stack(gradients), torch.stack(moments), group["momentum"])
        updates = orthogonalize(ahead).to(matrices[0].dtype)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(matrices, list(updates.unbind()), alpha=-group["lr"] * scale)  # pyright: ignore[reportPrivateImportUsage]
