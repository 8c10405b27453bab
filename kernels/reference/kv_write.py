"""qk-norm, RoPE and the write into pages, in torch.

RoPE is the half-split form (Su et al., 2021, arXiv:2104.09864, as Hugging Face's checkpoints are laid out):
    [x1, x2] ─► [x1 · cos − x2 · sin, x2 · cos + x1 · sin]
"""

from __future__ import annotations

import torch

from .fp8 import to_pages


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
    """See kernels/kv_write.py. Computed in fp32, rounded once on the way into the pages and out."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    k_scales, v_scales = (None, None) if kv_scales is None else kv_scales.unbind(0)
    rotated_q = _rotate(_normalise(q, q_norm, eps), cos, sin).to(q.dtype)
    rotated_k = _rotate(_normalise(k, k_norm, eps), cos, sin)
    page_size = kv_pages.shape[3]
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    kv_pages[0][pages, :, offsets] = to_pages(rotated_k, kv_pages.dtype, k_scales)
    kv_pages[1][pages, :, offsets] = to_pages(v, kv_pages.dtype, v_scales)
    return rotated_q


def _normalise(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x.float()
    return torch.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
