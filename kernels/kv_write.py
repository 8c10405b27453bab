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
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes kv_pages in place and returns q normalised and rotated.

    Args:
        q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]. Views of one QKV tensor are
            fine: only the last dimension need be contiguous.
        positions: int64 [num_tokens], row of cos_sin.
        cos_sin: fp32 [num_positions, head_dim], the cosines of the half-split rotation and then the sines.
        slot_mapping: int64 [num_tokens], page * page_size + offset, each slot once.
        kv_pages: [2, num_pages, num_kv_heads, page_size, head_dim] of one layer, of q's dtype or float8_e4m3fn.
        q_norm, k_norm: weights [head_dim] of a per-head RMS norm before the rotation.
        eps: of that norm.
        kv_scales: fp32 [2, num_kv_heads], contiguous, of keys and of values, for pages of float8_e4m3fn: what is stored is value / scale,
            rounded to the nearest and saturated at 448. None: 1. A scale a head costs what one a tensor does, since a program
            reads one head; for one a tensor, repeat it.
    """
    kernel = implementation("kv_write", q.device) if q.is_cuda else reference.kv_write
    return kernel(q, k, v, positions, cos_sin, slot_mapping, kv_pages, q_norm=q_norm, k_norm=k_norm, eps=eps, kv_scales=kv_scales)
