"""Prefill attention for head dimensions above 256, whose running output no register file holds: two passes over a strip of queries.

scores   a program a (64 to 128 queries, 128 keys):  Q · Kᵀ over tiles of the head dimension ─► 2^(score − tile's maximum) ─► memory
values   a program a (64 to 128 queries, 256 columns of V):  weights · 2^(tile's maximum − row's) · V over the keys ─► out

Each multiplication is done once, as in a plain matrix product; what passes through memory is a weight for each (query, key) in 16 bits,
little beside 4 · head_dim operations. A strip is as many queries as WORKSPACE_BYTES hold the weights of. Errors are those of the one-pass
kernel: weights are rounded relative to their tile's largest.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .block_mask import SPARSE_BLOCK
from .device import shared_bytes
from .fp8 import NOT_FP8, beside_fp8, widened

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
BLOCK = tl.constexpr(SPARSE_BLOCK)
KEYS_TILE = 128
WORKSPACE_BYTES = 1 << 30


@triton.jit
def _block(
    cu_seqlens_q_ptr, kv_lens_ptr, sequence, block, window,
    BLOCK_M: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Of a block of queries: its sequence's first token, number of queries, keys, and the tiles of keys that it sees, [begin, end)."""
    first_token = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - first_token
    kv_len = tl.load(kv_lens_ptr + sequence)
    first_position = kv_len - q_len + block * BLOCK_M
    end = tl.minimum(kv_len, first_position + BLOCK_M) if CAUSAL else kv_len
    begin = tl.maximum(0, first_position - window + 1) // KEYS if WINDOW else 0
    return first_token, q_len, kv_len, begin, tl.cdiv(tl.maximum(end, 0), KEYS)


@triton.jit
def _scores_kernel(
    q_ptr, kv_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr, weights_ptr, stats_ptr, scales_ptr, mask_ptr,
    stride_q, stride_q_head, stride_page, stride_table, stride_mask, stride_mask_head, stride_mask_row,
    first_block, num_blocks, num_heads, num_tiles, scale_log2, cap_log2, cap_inverse, window,
    GROUP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    strip_block = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    block = first_block + strip_block
    first_token, q_len, kv_len, begin, end = _block(cu_seqlens_q_ptr, kv_lens_ptr, sequence, block, window, BLOCK_M, KEYS, CAUSAL, WINDOW)
    if (block * BLOCK_M >= q_len) | (tile < begin) | (tile >= end):
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tile * KEYS + tl.arange(0, KEYS)
    columns = tl.arange(0, BLOCK_K)
    page = tl.load(block_table_ptr + sequence.to(tl.int64) * stride_table + keys // PAGE, mask=keys < kv_len, other=0).to(tl.int64)
    k_rows = kv_ptr + (head // GROUP) * (PAGE * HEAD_DIM) + page * stride_page + (keys % PAGE) * HEAD_DIM
    q_rows = q_ptr + (first_token + rows).to(tl.int64) * stride_q + head * stride_q_head
    scores = tl.zeros([BLOCK_M, KEYS], dtype=tl.float32)
    for first in range(0, HEAD_DIM, BLOCK_K):
        inside = first + columns < HEAD_DIM
        q = tl.load(q_rows[:, None] + (first + columns)[None, :], mask=(rows < q_len)[:, None] & inside[None, :], other=0.0)
        k = tl.load(k_rows[None, :] + (first + columns)[:, None], mask=(keys < kv_len)[None, :] & inside[:, None], other=0.0)
        if FP8:
            q = beside_fp8(q)
            k = widened(k, q.dtype, FP8)
        scores = tl.dot(q, k, scores, input_precision=PRECISION)
    if scales_ptr is not None:
        scores *= tl.load(scales_ptr + head // GROUP)
    if SOFT_CAP:  # cap · tanh(s·scale / cap), in units of log2
        scores = cap_log2 * (1.0 - 2.0 / (tl.exp2(scores * cap_inverse) + 1.0))
    positions = (kv_len - q_len + rows)[:, None]
    seen = (keys < kv_len)[None, :] & (rows < q_len)[:, None]
    if CAUSAL:
        seen = seen & (keys[None, :] <= positions)
    if WINDOW:
        seen = seen & (keys[None, :] > positions - window)
    if mask_ptr is not None:
        mask_rows = mask_ptr + sequence.to(tl.int64) * stride_mask + head * stride_mask_head + (rows // BLOCK) * stride_mask_row
        seen = seen & (tl.load(mask_rows[:, None] + (keys // BLOCK)[None, :], mask=seen, other=0) != 0)
    scores = tl.where(seen, scores * scale_log2, float("-inf"))
    row_max = tl.max(scores, axis=1)
    weights = tl.exp2(scores - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])

    place = (sequence.to(tl.int64) * num_heads + head) * num_blocks + strip_block
    cells = (place * BLOCK_M + tl.arange(0, BLOCK_M))[:, None] * (num_tiles * KEYS) + keys[None, :]
    tl.store(weights_ptr + cells, weights.to(weights_ptr.dtype.element_ty))
    stats = stats_ptr + (place * num_tiles + tile) * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(stats, row_max)
    tl.store(stats + BLOCK_M, tl.sum(weights, axis=1))


@triton.jit
def _values_kernel(
    kv_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr, weights_ptr, stats_ptr, out_ptr, lse_ptr, scales_ptr,
    stride_kv, stride_page, stride_table, first_block, num_blocks, num_heads, num_tiles, window,
    GROUP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # the columns of a block are neighbours: they read the same weights
    parts: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    strip_block = tl.program_id(0) // parts
    columns = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    block = first_block + strip_block
    first_token, q_len, kv_len, begin, end = _block(cu_seqlens_q_ptr, kv_lens_ptr, sequence, block, window, BLOCK_M, KEYS, CAUSAL, WINDOW)
    if block * BLOCK_M >= q_len:
        return
    place = (sequence.to(tl.int64) * num_heads + head) * num_blocks + strip_block
    stats = stats_ptr + place * num_tiles * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    row_max = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(begin, end):
        tile_max = tl.load(stats + tile * (2 * BLOCK_M))
        new_max = tl.maximum(row_max, tile_max)
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.load(stats + tile * (2 * BLOCK_M) + BLOCK_M) * tl.exp2(tile_max - new_max)
        row_max = new_max

    weight_rows = weights_ptr + (place * BLOCK_M + tl.arange(0, BLOCK_M)) * (num_tiles * KEYS)
    table_ptr = block_table_ptr + sequence.to(tl.int64) * stride_table
    v_ptr = kv_ptr + stride_kv + (head // GROUP) * (PAGE * HEAD_DIM)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(begin * KEYS, end * KEYS, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        page = tl.load(table_ptr + keys // PAGE, mask=keys < kv_len, other=0).to(tl.int64)
        at = v_ptr + page * stride_page + (keys % PAGE) * HEAD_DIM
        v = tl.load(at[:, None] + columns[None, :], mask=(keys < kv_len)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        decay = tl.exp2(tl.load(stats + start // KEYS * (2 * BLOCK_M)) - row_max)
        weights = tl.load(weight_rows[:, None] + keys[None, :]).to(tl.float32) * decay[:, None]
        if FP8:
            v = widened(v, weights_ptr.dtype.element_ty, FP8)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    if scales_ptr is not None:
        acc *= tl.load(scales_ptr + num_heads // GROUP + head // GROUP)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = (first_token + rows).to(tl.int64)
    if lse_ptr is not None:
        if tl.program_id(0) % parts == 0:
            tl.store(lse_ptr + tokens * num_heads + head, (row_max + tl.log2(row_sum)) * LN_2, mask=rows < q_len)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    to = out_ptr + (tokens[:, None] * num_heads + head) * HEAD_DIM + columns[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :])


class Tiles(NamedTuple):
    block_m: int
    block_k: int  # of the head dimension, in scores
    block_d: int  # of the head dimension, in values
    block_n: int  # keys at a time, in values
    num_warps: int
    num_stages: int


def tiles(max_seqlen_q: int, element_size: int, shared: int) -> Tiles:
    """For a longest run of queries and the bytes of shared memory that a program may take: none spills, all fit."""
    if element_size > 2:
        return Tiles(32, 32, 32, 32, 4, 1)
    block_m = 128 if max_seqlen_q > 64 else max(16, triton.next_power_of_2(max_seqlen_q))
    if shared < 200_000:
        return Tiles(min(block_m, 64), 32, 128, 32, 4, 2)
    return Tiles(block_m, 64, 256 if block_m == 128 else 128, 64, 8 if block_m == 128 else 4, 3)


def wide_prefill(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    max_seqlen_q: int,
    max_kv_len: int,
    scale: float,
    sliding_window: int,
    logit_soft_cap: float,
    causal: bool,
    kv_scales: torch.Tensor | None,
    block_mask: torch.Tensor | None,
    fp8: int,
) -> None:
    """As flash_prefill, into out and lse. kv_pages and fp8 as fp8.readable gives them; block_mask [num_seqs, num_heads, ...]."""
    num_heads, head_dim = q.shape[1:]
    num_seqs, num_kv_heads, page_size = kv_lens.shape[0], kv_pages.shape[2], kv_pages.shape[3]
    tile = tiles(max_seqlen_q, q.element_size(), shared_bytes(q.device))
    num_tiles = triton.cdiv(max_kv_len, KEYS_TILE)
    weights_dtype = torch.float16 if fp8 != NOT_FP8 and q.element_size() == 2 else q.dtype
    block_bytes = num_seqs * num_heads * tile.block_m * num_tiles * KEYS_TILE * weights_dtype.itemsize
    num_all = triton.cdiv(max_seqlen_q, tile.block_m)
    strip = max(1, min(num_all, WORKSPACE_BYTES // block_bytes))
    cells = num_seqs * num_heads * strip * tile.block_m * num_tiles
    weights = torch.empty(cells * KEYS_TILE, dtype=weights_dtype, device=q.device)
    stats = torch.empty(cells * 2, dtype=torch.float32, device=q.device)
    capped = logit_soft_cap > 0
    scales = kv_scales if fp8 != NOT_FP8 else None
    mask_strides = (None, None, None) if block_mask is None else block_mask.stride()[:3]
    common: dict[str, Any] = dict(  # noqa: C408 - read as the arguments they are
        GROUP=num_heads // num_kv_heads, PAGE=page_size, HEAD_DIM=head_dim, BLOCK_M=tile.block_m, KEYS=KEYS_TILE, CAUSAL=causal,
        WINDOW=sliding_window > 0, FP8=fp8, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    for first in range(0, num_all, strip):
        count = min(strip, num_all - first)
        _scores_kernel[count * num_tiles, num_heads, num_seqs](
            q, kv_pages, block_table, cu_seqlens_q, kv_lens, weights, stats, scales, block_mask,
            q.stride(0), q.stride(1), kv_pages.stride(1), block_table.stride(0), *mask_strides,
            first, strip, num_heads, num_tiles, 1.0 if capped else scale * LOG2_E, logit_soft_cap * LOG2_E,
            2 * LOG2_E * scale / logit_soft_cap if capped else 0.0, sliding_window,
            BLOCK_K=tile.block_k, SOFT_CAP=capped, **common,
        )  # fmt: skip
        _values_kernel[count * triton.cdiv(head_dim, tile.block_d), num_heads, num_seqs](
            kv_pages, block_table, cu_seqlens_q, kv_lens, weights, stats, out, lse, scales,
            kv_pages.stride(0), kv_pages.stride(1), block_table.stride(0), first, strip, num_heads, num_tiles, sliding_window,
            BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, **common,
        )  # fmt: skip
