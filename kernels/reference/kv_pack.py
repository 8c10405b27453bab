"""Pages out of a cache and back, in torch."""

from __future__ import annotations

import torch


def kv_pack(kv_pages: torch.Tensor, pages: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See kernels/kv_pack.py."""
    blocks = kv_pages.transpose(0, 1).index_select(0, pages).contiguous()
    return blocks if out is None else out.copy_(blocks)


def kv_unpack(blocks: torch.Tensor, kv_pages: torch.Tensor, pages: torch.Tensor) -> None:
    """See kernels/kv_pack.py."""
    if kv_pages.dtype.itemsize == 1:  # torch copies fp8 by index on no CPU
        blocks, kv_pages = blocks.view(torch.uint8), kv_pages.view(torch.uint8)
    kv_pages.transpose(0, 1).index_copy_(0, pages, blocks)
