"""Keys and values as fp8 (e4m3) in torch: what is stored is value / scale, saturated; what is read is stored · scale."""

from __future__ import annotations

import torch

LARGEST = 448.0


def to_pages(x: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None) -> torch.Tensor:
    """x [..., num_kv_heads, head_dim] as a cache of dtype holds it; scales fp32 [num_kv_heads], None: 1."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    scaled = x.float() if scales is None else x.float() / scales.unsqueeze(-1)
    return scaled.clamp(-LARGEST, LARGEST).to(dtype)


def take_pages(kv_pages: torch.Tensor, pages: torch.Tensor, kv_scales: torch.Tensor | None) -> torch.Tensor:
    """fp32 [2, len(pages), num_kv_heads, page_size, head_dim]; kv_scales fp32 [2, num_kv_heads]."""
    taken = kv_pages.index_select(1, pages).float()
    return taken if kv_scales is None else taken * kv_scales[:, None, :, None, None]
