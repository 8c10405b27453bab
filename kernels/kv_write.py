"""From projected Q, K, V to attention's inputs: qk-norm, RoPE, and K and V into their pages."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import kv_write as reference


def kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_pages: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Writes kv_pages in place and returns q normalised and rotated.

    Args:
        q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]. Views of one QKV tensor are
            fine: only the last dimension need be contiguous.
        positions: int64 [num_tokens], row of cos_sin.
        cos_sin: fp32 [num_positions, head_dim], the cosines of the half-split rotation and then the sines.
        slot_mapping: int64 [num_tokens], page * page_size + offset, each slot once.
        kv_pages: [2, num_pages, num_kv_heads, page_size, head_dim] of one layer.
        q_norm, k_norm: weights [head_dim] of a per-head RMS norm before the rotation.
        eps: of that norm.
    """
    if q.is_cuda:
        kernel = implementation("kv_write", q.device)
        return kernel(q, k, v, positions, cos_sin, slot_mapping, kv_pages, q_norm=q_norm, k_norm=k_norm, eps=eps)
    return reference.kv_write(q, k, v, positions, cos_sin, slot_mapping, kv_pages, q_norm=q_norm, k_norm=k_norm, eps=eps)
