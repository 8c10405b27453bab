"""Prefill attention over paged keys and values (FlashAttention-2's online softmax), on any GPU that Triton's tl.dot reaches.

             keys of one sequence, page by page ──►  0 ................ first ... last of the chunk
queries      ┌──────────────────────────────────────────────────────┬─┐
(the last    │            whole tiles: no mask                      │▒│ tiles on the diagonal, or at an edge of the
positions)   └──────────────────────────────────────────────────────┴─┘ window or of the sequence: masked

One program a (block of query rows, head, sequence). The longest rows start first. Nothing is read back to the host: the grid follows
max_seqlen_q, and a program beyond its sequence's queries ends at once.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .device import shared_bytes

LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, first, last, positions, kv_len, window,
    scale_log2, cap_log2, cap_inverse, stride_page,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [first, last) into the running softmax. first is a multiple of BLOCK_N."""
    columns = tl.arange(0, BLOCK_D)
    # The page of the next tile is read a tile ahead: read in its own tile, it would take half of the pipeline's stages.
    next_page = tl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if PAGE % BLOCK_N == 0:
            page = next_page.to(tl.int64)
            next_page = tl.load(table_ptr + (start + BLOCK_N) // PAGE, mask=start + BLOCK_N < last, other=0)
            rows = page * stride_page + ((start % PAGE) + tl.arange(0, BLOCK_N)) * HEAD_DIM
        else:
            page = tl.load(table_ptr + keys // PAGE, mask=keys < kv_len, other=0).to(tl.int64)
            rows = page * stride_page + (keys % PAGE) * HEAD_DIM
        # K is transposed by its addresses: mma.sync's operand then comes from shared memory as it lies there
        known = keys < kv_len
        if MASK:  # values beyond the sequence may be anything, and 0 · NaN is NaN
            k = tl.load(k_ptr + rows[None, :] + columns[:, None], mask=known[None, :] & (columns < HEAD_DIM)[:, None], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            k = tl.load(k_ptr + rows[None, :] + columns[:, None], mask=(columns < HEAD_DIM)[:, None], other=0.0)
        else:
            k = tl.load(k_ptr + rows[None, :] + columns[:, None])
        scores = tl.dot(q, k, input_precision=PRECISION)
        if SOFT_CAP:  # cap · tanh(s·scale / cap), in units of log2
            scores = cap_log2 * (1.0 - 2.0 / (tl.exp2(scores * cap_inverse) + 1.0))
        if MASK:
            seen = (keys < kv_len)[None, :]
            if CAUSAL:
                seen = seen & (keys[None, :] <= positions[:, None])
            if WINDOW:
                seen = seen & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        # a row that has seen no key yet has the maximum -inf, and exp2(-inf - -inf) is NaN
        base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASK else new_max
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        decay = tl.exp2(row_max - base)
        row_sum = row_sum * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        row_max = new_max
        if MASK:
            v = tl.load(v_ptr + rows[:, None] + columns[None, :], mask=known[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            v = tl.load(v_ptr + rows[:, None] + columns[None, :], mask=(columns < HEAD_DIM)[None, :], other=0.0)
        else:
            v = tl.load(v_ptr + rows[:, None] + columns[None, :])
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _flash_prefill_kernel(
    q_ptr, kv_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr, out_ptr,
    stride_q, stride_q_head, stride_kv, stride_page, stride_table, num_heads, scale_log2, cap_log2, cap_inverse, window,
    GROUP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(2)
    head = tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    first_token = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - first_token
    if block * BLOCK_M >= q_len:
        return
    kv_len = tl.load(kv_lens_ptr + sequence)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    positions = kv_len - q_len + rows
    first_position = kv_len - q_len + block * BLOCK_M
    tokens = (first_token + rows).to(tl.int64)
    inside = (rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + tokens[:, None] * stride_q + head * stride_q_head + columns[None, :], mask=inside, other=0.0)

    end = kv_len
    whole_end = kv_len
    if CAUSAL:
        end = tl.minimum(kv_len, first_position + BLOCK_M)
        whole_end = tl.minimum(kv_len, first_position + 1)  # below it every row sees every key
    begin = 0
    whole_begin = 0
    if WINDOW:
        begin = tl.maximum(0, first_position - window + 1) // BLOCK_N * BLOCK_N
        whole_begin = tl.maximum(0, first_position + BLOCK_M - window)  # from it on every row sees every key
        whole_begin = tl.minimum(tl.cdiv(whole_begin, BLOCK_N) * BLOCK_N, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    whole_end = tl.maximum(whole_end // BLOCK_N * BLOCK_N, whole_begin)

    k_ptr = kv_ptr + (head // GROUP) * (PAGE * HEAD_DIM)
    v_ptr = k_ptr + stride_kv
    table_ptr = block_table_ptr + sequence.to(tl.int64) * stride_table
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if WINDOW:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, begin, tl.minimum(whole_begin, end), positions, kv_len, window,
            scale_log2, cap_log2, cap_inverse, stride_page,
            PAGE, HEAD_DIM, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOW, SOFT_CAP, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, whole_begin, whole_end, positions, kv_len, window,
        scale_log2, cap_log2, cap_inverse, stride_page,
        PAGE, HEAD_DIM, BLOCK_N, BLOCK_D, False, CAUSAL, WINDOW, SOFT_CAP, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, whole_end, end, positions, kv_len, window,
        scale_log2, cap_log2, cap_inverse, stride_page,
        PAGE, HEAD_DIM, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOW, SOFT_CAP, PRECISION,
    )  # fmt: skip
    out = acc / row_sum[:, None]
    to = out_ptr + tokens[:, None] * (num_heads * HEAD_DIM) + head * HEAD_DIM + columns[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside)


class Tiles(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles(head_dim: int, max_seqlen_q: int, element_size: int, shared: int) -> Tiles:
    """The tiles for a shape (longest run of queries, bytes of shared memory a program may take): none spills, all fit.

    With 227 KB (Hopper, Blackwell) the matrix unit reads K and V from shared memory; with less (Ampere, Ada) they pass through registers.
    """
    if element_size > 2:
        return Tiles(32, 32, 4, 1)
    block_m = 128 if max_seqlen_q > 64 else max(16, triton.next_power_of_2(max_seqlen_q))
    wide = shared >= 200_000
    if head_dim > 128:
        block_m = block_m if wide else min(block_m, 64)
        return Tiles(block_m, 32, 8 if block_m >= 64 else 4, 3 if wide else 2)
    return Tiles(block_m, 64 if wide or head_dim <= 64 else 32, 8 if block_m == 128 else 4, 3)


def flash_prefill(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_kv_len: int,
    scale: float,
    sliding_window: int = 0,
    logit_soft_cap: float = 0.0,
    causal: bool = True,
) -> torch.Tensor:
    """q [num_tokens, num_heads, head_dim] bf16/fp16 (a view of a fused projection is fine) -> out of the same shape, contiguous.

    kv_pages [2, num_pages, num_kv_heads, page_size, head_dim], pages contiguous; block_table int32 [num_seqs, max_pages];
    cu_seqlens_q int32 [num_seqs + 1]; kv_lens int32 [num_seqs]. The queries of a sequence are its last positions, and their K/V
    stand in the pages. sliding_window 0: none, else position i sees keys j with i - window < j <= i. logit_soft_cap 0: none, else
    scores become cap · tanh(score / cap). scale > 0. causal False: a query sees all keys (from the window's lower bound on).

    Online softmax: Dao, FlashAttention-2 (arXiv 2307.08691).
    """
    num_tokens, num_heads, head_dim = q.shape
    page_size = kv_pages.shape[3]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    tile = tiles(head_dim, max_seqlen_q, q.element_size(), shared_bytes(q.device))
    grid = (triton.cdiv(max_seqlen_q, tile.block_m), num_heads, kv_lens.shape[0])
    capped = logit_soft_cap > 0
    _flash_prefill_kernel[grid](
        q, kv_pages, block_table, cu_seqlens_q, kv_lens, out,
        q.stride(0), q.stride(1), kv_pages.stride(0), kv_pages.stride(1), block_table.stride(0), num_heads,
        1.0 if capped else scale * LOG2_E, logit_soft_cap * LOG2_E, 2 * LOG2_E * scale / logit_soft_cap if capped else 0.0, sliding_window,
        GROUP=num_heads // kv_pages.shape[2], PAGE=page_size, HEAD_DIM=head_dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim), CAUSAL=causal, WINDOW=sliding_window > 0, SOFT_CAP=capped,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
