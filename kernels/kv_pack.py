"""Pages of a layer to canonical block slices, side by side, and back: what one copy to or from the host then moves."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import kv_pack as reference


def kv_pack(kv_pages: torch.Tensor, pages: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of pages: blocks [n, 2, num_kv_heads, page_size, head_dim], contiguous, or out.

    Args:
        kv_pages: [2, num_pages, num_kv_heads, page_size, head_dim] of one layer, of any dtype.
        pages: int64 [n].
        out: of that shape and dtype, each block contiguous in itself.
    """
    if kv_pages.is_cuda:
        return implementation("kv_pack", kv_pages.device)(kv_pages, pages, out)
    return reference.kv_pack(kv_pages, pages, out)


def kv_unpack(blocks: torch.Tensor, kv_pages: torch.Tensor, pages: torch.Tensor) -> None:
    """The inverse, in place: blocks as kv_pack gives them, of kv_pages' dtype; a page may stand once in pages.

    Raises ValueError where blocks are not n of that shape and dtype.
    """
    wanted = (len(pages), 2, *kv_pages.shape[2:])
    if blocks.shape != wanted or blocks.dtype != kv_pages.dtype:
        raise ValueError(f"blocks are {tuple(blocks.shape)} of {blocks.dtype}; these pages take {wanted} of {kv_pages.dtype}")
    if kv_pages.is_cuda:
        implementation("kv_pack", kv_pages.device, "kv_unpack")(blocks, kv_pages, pages)
    else:
        reference.kv_unpack(blocks, kv_pages, pages)
