"""The fp8 pages of a batch as 16-bit pages, for kernels that read no fp8: as many bytes as a chunk's attention reads many times over.

pages of a sequence, anywhere ─► value · scale ─► a cache of its own, the sequence's pages side by side
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import readable, widened


@triton.jit
def _widen_kernel(
    kv_ptr, block_table_ptr, kv_lens_ptr, scales_ptr, out_ptr, stride_kv, stride_page, stride_table, stride_out, pages_each, num_kv_heads,
    PAGE: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0) // pages_each
    index = tl.program_id(0) % pages_each
    head = tl.program_id(1)
    side = tl.program_id(2)
    if index * PAGE >= tl.load(kv_lens_ptr + sequence):
        return
    page = tl.load(block_table_ptr + sequence.to(tl.int64) * stride_table + index).to(tl.int64)
    from_ptr = kv_ptr + side.to(tl.int64) * stride_kv + page * stride_page + head * CELLS
    to_ptr = out_ptr + side.to(tl.int64) * stride_out + (tl.program_id(0).to(tl.int64) * num_kv_heads + head) * CELLS
    scale = tl.load(scales_ptr + side * num_kv_heads + head) if scales_ptr is not None else 1.0
    for first in range(0, CELLS, BLOCK):
        cells = first + tl.arange(0, BLOCK)
        x = widened(tl.load(from_ptr + cells, mask=cells < CELLS, other=0), tl.float32, FP8) * scale
        tl.store(to_ptr + cells, x.to(out_ptr.dtype.element_ty), mask=cells < CELLS)


def widened_bytes(kv_pages: torch.Tensor, num_seqs: int, max_kv_len: int) -> int:
    """Of the 16-bit pages."""
    _, _, num_kv_heads, page_size, head_dim = kv_pages.shape
    return 4 * num_seqs * -(-max_kv_len // page_size) * num_kv_heads * page_size * head_dim


def widened_pages(
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    kv_scales: torch.Tensor | None,
    max_kv_len: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn pages (else as flash_prefill's) -> pages of dtype and their block table.
    Pages behind a sequence's last are not written."""
    _, _, num_kv_heads, page_size, head_dim = kv_pages.shape
    num_seqs, pages_each = kv_lens.shape[0], triton.cdiv(max_kv_len, page_size)
    out = torch.empty((2, num_seqs * pages_each, num_kv_heads, page_size, head_dim), dtype=dtype, device=kv_pages.device)
    stored, fp8 = readable(kv_pages)
    cells = page_size * head_dim
    _widen_kernel[num_seqs * pages_each, num_kv_heads, 2](
        stored, block_table, kv_lens, kv_scales, out, stored.stride(0), stored.stride(1), block_table.stride(0), out.stride(0),
        pages_each, num_kv_heads, PAGE=page_size, CELLS=cells, BLOCK=min(4096, triton.next_power_of_2(cells)), FP8=fp8, num_warps=4,
    )  # fmt: skip
    table = torch.arange(num_seqs * pages_each, dtype=torch.int32, device=kv_pages.device).view(num_seqs, pages_each)
    return out, table
