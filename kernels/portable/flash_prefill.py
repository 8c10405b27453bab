"""Prefill attention over paged keys and values (FlashAttention-2's online softmax), on any GPU that Triton's tl.dot reaches.

             keys of one sequence, page by page ──►  0 ................ first ... last of the chunk
queries      ┌──────────────────────────────────────────────────────┬─┐
(the last    │            whole tiles: no mask                      │▒│ tiles on the diagonal, or at an edge of the
positions)   └──────────────────────────────────────────────────────┴─┘ window or of the sequence: masked

One program a (block of query rows, head, sequence). The longest rows start first. Nothing is read back to the host: the grid follows
max_seqlen_q, and a program beyond its sequence's queries ends at once. Few queries over many keys would leave most of the GPU idle: their
keys are split among several programs, and partial results merged (merge.py). A block mask becomes lists of the blocks to visit
(block_mask.py). Head dimensions above 256 are wide_prefill.py's.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .block_mask import SPARSE_BLOCK, live_blocks
from .device import num_sms, shared_bytes
from .fp8 import beside_fp8, readable, widened
from .merge import MOST_SPLITS, merge_splits
from .wide_prefill import wide_prefill

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
LEAST_KEYS = 1024  # of a split
PACKED_QUERIES = 64  # of a sequence, at most, where the heads of a group are packed


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, blocks_ptr, first, last, positions, kv_len, window,
    scale_log2, cap_log2, cap_inverse, stride_page,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, SPARSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [first, last) into the running softmax; where SPARSE, of those that a list names by blocks of so many keys.
    first is a multiple of BLOCK_N.
    """
    columns = tl.arange(0, BLOCK_D)
    # The page of the next tile is read a tile ahead: read in its own tile, it would take half of the pipeline's stages.
    next_page = tl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    for place in range(first, last, BLOCK_N):
        start = place
        if SPARSE:
            start = tl.load(blocks_ptr + place // SPARSE) * SPARSE + place % SPARSE
        keys = start + tl.arange(0, BLOCK_N)
        if PAGE % BLOCK_N == 0 and not SPARSE:
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
        if FP8:
            k = widened(k, q.dtype, FP8)
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
        if FP8:
            v = widened(v, q.dtype, FP8)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _bounds(
    kv_len, first_position, window,
    NUM_Q: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The keys that NUM_Q queries from first_position on see, [begin, end), and those that all of them see, [whole_begin, whole_end).

    All but end are multiples of BLOCK_N.
    """
    end = kv_len
    whole_end = kv_len
    if CAUSAL:
        end = tl.minimum(kv_len, first_position + NUM_Q)
        whole_end = tl.minimum(kv_len, first_position + 1)  # below it every row sees every key
    begin = 0
    whole_begin = 0
    if WINDOW:
        begin = tl.maximum(0, first_position - window + 1) // BLOCK_N * BLOCK_N
        whole_begin = tl.maximum(0, first_position + NUM_Q - window)  # from it on every row sees every key
        whole_begin = tl.minimum(tl.cdiv(whole_begin, BLOCK_N) * BLOCK_N, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    whole_end = tl.maximum(whole_end // BLOCK_N * BLOCK_N, whole_begin)
    return begin, whole_begin, whole_end, end


# how many splits there are must not make another kernel: chunks of all lengths are served
@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _flash_prefill_kernel(
    q_ptr, kv_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr, out_ptr, lse_ptr, scales_ptr, counts_ptr, blocks_ptr,
    stride_q, stride_q_head, stride_kv, stride_page, stride_table, stride_counts, stride_counts_head, stride_blocks,
    num_tokens, splits, num_heads, scale_log2, cap_log2, cap_inverse, window,
    GROUP: tl.constexpr, PACK: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, SPARSE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NUM_Q: tl.constexpr = BLOCK_M // PACK  # query tokens of a program, each with PACK heads
    sequence = tl.program_id(2) // splits if SPLIT else tl.program_id(2)
    head = tl.program_id(1) * PACK
    kv_head = head // GROUP
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    first_token = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - first_token
    if block * NUM_Q >= q_len:
        return
    kv_len = tl.load(kv_lens_ptr + sequence)
    if kv_len == 0:
        return
    rows = block * NUM_Q + tl.arange(0, BLOCK_M) // PACK
    columns = tl.arange(0, BLOCK_D)
    positions = kv_len - q_len + rows
    first_position = kv_len - q_len + block * NUM_Q
    tokens = (first_token + rows).to(tl.int64)
    inside = (rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :]
    heads = head if PACK == 1 else (head + tl.arange(0, BLOCK_M) % PACK)[:, None]
    q = tl.load(q_ptr + tokens[:, None] * stride_q + heads * stride_q_head + columns[None, :], mask=inside, other=0.0)
    if FP8:
        q = beside_fp8(q)
    if scales_ptr is not None:
        k_scale = tl.load(scales_ptr + kv_head)
        scale_log2 = scale_log2 if SOFT_CAP else scale_log2 * k_scale
        cap_inverse = cap_inverse * k_scale

    begin, whole_begin, whole_end, end = _bounds(kv_len, first_position, window, NUM_Q, BLOCK_N, CAUSAL, WINDOW)
    if SPARSE:  # keys are then counted along the list of blocks, each of which may want a mask
        entry = sequence.to(tl.int64) * stride_counts + head * stride_counts_head + block * BLOCK_M // SPARSE
        blocks_ptr += entry * stride_blocks
        begin, whole_begin, whole_end, end = 0, 0, 0, tl.load(counts_ptr + entry) * SPARSE
    if SPLIT:
        split = tl.program_id(2) % splits
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
        begin += split * share
        end = tl.minimum(begin + share, end)
        whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
        whole_end = tl.minimum(tl.maximum(whole_end, begin), end)

    k_ptr = kv_ptr + kv_head * (PAGE * HEAD_DIM)
    v_ptr = k_ptr + stride_kv
    table_ptr = block_table_ptr + sequence.to(tl.int64) * stride_table
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if WINDOW and not SPARSE:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, None, begin, tl.minimum(whole_begin, end), positions, kv_len, window,
            scale_log2, cap_log2, cap_inverse, stride_page,
            PAGE, HEAD_DIM, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOW, SOFT_CAP, FP8, 0, PRECISION,
        )  # fmt: skip
    if not SPARSE:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, None, whole_begin, whole_end, positions, kv_len, window,
            scale_log2, cap_log2, cap_inverse, stride_page,
            PAGE, HEAD_DIM, BLOCK_N, BLOCK_D, False, CAUSAL, WINDOW, SOFT_CAP, FP8, 0, PRECISION,
        )  # fmt: skip
    else:
        whole_end = begin
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, blocks_ptr, whole_end, end, positions, kv_len, window,
        scale_log2, cap_log2, cap_inverse, stride_page,
        PAGE, HEAD_DIM, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOW, SOFT_CAP, FP8, SPARSE, PRECISION,
    )  # fmt: skip
    if scales_ptr is not None:
        acc *= tl.load(scales_ptr + num_heads // GROUP + kv_head)
    if SPLIT:
        tokens += (tl.program_id(2) % splits).to(tl.int64) * num_tokens
    if lse_ptr is not None:  # natural, and a part's in units of log2
        lse = (row_max + tl.log2(row_sum)) * (1.0 if SPLIT else LN_2)
        lse_head = head if PACK == 1 else head + tl.arange(0, BLOCK_M) % PACK
        tl.store(lse_ptr + tokens * num_heads + lse_head, lse, mask=rows < q_len)
    if lse_ptr is not None or SPARSE:
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a row that sees no key
    out = acc / row_sum[:, None]
    to = out_ptr + tokens[:, None] * (num_heads * HEAD_DIM) + heads * HEAD_DIM + columns[None, :]
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


def packed_heads(group: int, max_seqlen_q: int) -> int:
    """Query heads of a kv head that share a program's rows: all, where the queries alone would leave rows empty, and K and V be read
    once for each head."""
    return group if max_seqlen_q <= PACKED_QUERIES and 1 < group <= 16 and group & (group - 1) == 0 else 1


def num_splits(num_blocks: int, max_kv_len: int, sms: int) -> int:
    """Programs that share a block's keys, so that num_blocks blocks make one wave on the GPU's SMs, and none has few keys."""
    return max(1, min(sms // max(num_blocks, 1), max_kv_len // LEAST_KEYS, MOST_SPLITS))


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
    kv_scales: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    usual_num_seqs: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q [num_tokens, num_heads, head_dim] bf16/fp16 (a view of a fused projection is fine) -> out of the same shape, contiguous.

    kv_pages [2, num_pages, num_kv_heads, page_size, head_dim], pages contiguous; block_table int32 [num_seqs, max_pages];
    cu_seqlens_q int32 [num_seqs + 1]; kv_lens int32 [num_seqs]. The queries of a sequence are its last positions, and their K/V
    stand in the pages. sliding_window 0: none, else position i sees keys j with i - window < j <= i. logit_soft_cap 0: none, else
    scores become cap · tanh(score / cap). scale > 0. causal False: a query sees all keys (from the window's lower bound on).
    kv_scales, block_mask, return_lse, usual_num_seqs: as in kernels/flash_prefill.py.

    Online softmax: Dao, FlashAttention-2 (arXiv 2307.08691). Block mask: Dao et al., FlashAttention (arXiv 2205.14135), section 3.3.
    """
    num_tokens, num_heads, head_dim = q.shape
    kv_pages, fp8 = readable(kv_pages)
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q.device) if return_lse else None
    if num_tokens == 0:
        return out if lse is None else (out, lse)
    if block_mask is not None:
        block_mask = block_mask.expand(-1, num_heads, -1, -1)
    if head_dim > 256:
        wide_prefill(
            q, kv_pages, block_table, cu_seqlens_q, kv_lens, out, lse, max_seqlen_q=max_seqlen_q, max_kv_len=max_kv_len, scale=scale,
            sliding_window=sliding_window, logit_soft_cap=logit_soft_cap, causal=causal, kv_scales=kv_scales, block_mask=block_mask,
            fp8=fp8,
        )  # fmt: skip
        return out if lse is None else (out, lse)
    counts = blocks = None
    if block_mask is not None:
        counts, blocks = live_blocks(block_mask, cu_seqlens_q, kv_lens, causal, sliding_window)
    _launch(
        q, kv_pages, fp8, block_table, cu_seqlens_q, kv_lens, out, lse, counts, blocks, kv_scales if fp8 else None,
        max_seqlen_q, max_kv_len, scale, sliding_window, logit_soft_cap, causal, usual_num_seqs or kv_lens.shape[0],
    )  # fmt: skip
    return out if lse is None else (out, lse)


def _launch(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    fp8: int,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    counts: torch.Tensor | None,
    blocks: torch.Tensor | None,
    kv_scales: torch.Tensor | None,
    max_seqlen_q: int,
    max_kv_len: int,
    scale: float,
    sliding_window: int,
    logit_soft_cap: float,
    causal: bool,
    usual_num_seqs: int,
) -> None:
    """Into out and lse. kv_pages, fp8: as readable() gives them; counts, blocks: as live_blocks() does, None without a mask."""
    num_tokens, num_heads, head_dim = q.shape
    num_seqs, num_kv_heads, page_size = kv_lens.shape[0], kv_pages.shape[2], kv_pages.shape[3]
    group = num_heads // num_kv_heads
    pack = packed_heads(group, max_seqlen_q) if blocks is None else 1
    longest = max_seqlen_q * pack if blocks is None else min(max_seqlen_q, SPARSE_BLOCK)
    tile = tiles(head_dim, longest, q.element_size(), shared_bytes(q.device))
    num_q = tile.block_m // pack
    num_blocks = max(usual_num_seqs, triton.cdiv(num_tokens, num_q)) * (num_heads // pack)
    splits = num_splits(num_blocks, max_kv_len, num_sms(q.device))
    parts, parts_lse = out, lse
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        parts_lse = torch.empty((splits, num_tokens, num_heads), dtype=torch.float32, device=q.device)
    capped = logit_soft_cap > 0
    _flash_prefill_kernel[triton.cdiv(max_seqlen_q, num_q), num_heads // pack, num_seqs * splits](
        q, kv_pages, block_table, cu_seqlens_q, kv_lens, parts, parts_lse, kv_scales, counts, blocks,
        q.stride(0), q.stride(1), kv_pages.stride(0), kv_pages.stride(1), block_table.stride(0),
        counts.stride(0) if counts is not None else None, counts.stride(1) if counts is not None else None,
        blocks.stride(2) if blocks is not None else None, num_tokens if splits > 1 else None, splits if splits > 1 else None,
        num_heads, 1.0 if capped else scale * LOG2_E, logit_soft_cap * LOG2_E, 2 * LOG2_E * scale / logit_soft_cap if capped else 0.0,
        sliding_window,
        GROUP=group, PACK=pack, PAGE=page_size, HEAD_DIM=head_dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim), CAUSAL=causal, WINDOW=sliding_window > 0, SOFT_CAP=capped, FP8=fp8,
        SPARSE=0 if blocks is None else SPARSE_BLOCK, SPLIT=splits > 1, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        assert parts_lse is not None
        merge_splits(parts, parts_lse, out, lse)
