"""Pages to block slices and back, as bytes: one launch a layer, every byte read once and written once.

kv_pages [k|v][page] ............   K of a page and V of a page lie far apart
blocks   [block][k|v]            n · 2 contiguous runs of page_size · num_kv_heads · head_dim values, which one copy takes to the host
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # words: with 8 bytes each, 16 KB a program
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit
def _kv_copy_kernel(kv_ptr, blocks_ptr, pages_ptr, stride_kv, stride_page, stride_block, width, PACK: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1).to(tl.int64)
    words = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(pages_ptr + place).to(tl.int64)
    in_cache = kv_ptr + side * stride_kv + page * stride_page + words
    in_block = blocks_ptr + place * stride_block + side * width + words
    if PACK:
        tl.store(in_block, tl.load(in_cache, mask=words < width), mask=words < width)
    else:
        tl.store(in_cache, tl.load(in_block, mask=words < width), mask=words < width)


def _copy(kv_pages: torch.Tensor, blocks: torch.Tensor, pages: torch.Tensor, pack: bool) -> None:
    num_bytes = kv_pages[0, 0].numel() * kv_pages.element_size()
    both = num_bytes | kv_pages.data_ptr() | blocks.data_ptr() | blocks.stride(0) * blocks.element_size()
    word = next(dtype for dtype in WORDS if both % dtype.itemsize == 0)
    cache, out = (x.view(torch.uint8).view(*x.shape[:2], num_bytes).view(word) for x in (kv_pages, blocks))
    _kv_copy_kernel[len(pages), 2, triton.cdiv(cache.shape[2], BLOCK)](
        cache, out, pages, cache.stride(0), cache.stride(1), out.stride(0), cache.shape[2], PACK=pack, BLOCK=BLOCK, num_warps=4
    )


def kv_pack(kv_pages: torch.Tensor, pages: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See kernels/kv_pack.py. kv_pages contiguous."""
    blocks = torch.empty((len(pages), 2, *kv_pages.shape[2:]), dtype=kv_pages.dtype, device=kv_pages.device) if out is None else out
    if len(pages):
        _copy(kv_pages, blocks, pages, True)
    return blocks


def kv_unpack(blocks: torch.Tensor, kv_pages: torch.Tensor, pages: torch.Tensor) -> None:
    """See kernels/kv_pack.py. kv_pages contiguous."""
    if len(pages):
        _copy(kv_pages, blocks if blocks[:1].is_contiguous() else blocks.contiguous(), pages, False)
