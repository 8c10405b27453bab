"""Decode attention: one query token a sequence, or a few, over paged keys and values, bound by the bytes of the KV cache.

The tiles of all (sequence, kv head) pairs stand in one row, and every program takes an equal share of it, wherever sequences begin or end:

tiles     | seq 0 head 0 | seq 0 head 1 | seq 1 head 0 ................. | seq 1 head 1 ................. |
programs  |    0    |    1    |    2    |    3    |    4    |    5    |    6    |    7    |    8    |    9    |

So one wave of programs fills the GPU for any batch and any lengths. The shares are computed on the device from kv_lens: nothing is read
back to the host, and a CUDA graph captured for the longest lengths splits well for those it is replayed with. A pair that several programs
share is merged by the one that arrives last. All query heads of a kv head, of all the query tokens, make the rows of one matrix tile.

Work split over a flattened row of tiles: Sanovar et al., Lean Attention (arXiv 2405.10480).
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .counters import zeroed_counters
from .device import num_sms, shared_bytes
from .fp8 import NOT_FP8, beside_fp8, readable, widened_pairs

LOG2_E = 1.4426950408889634
MERGE_CELLS = 4096  # of partial results that a merge has in flight
MANY_PAIRS = 32  # (sequence, kv head) pairs, from which on what pays for itself by the tile is done
MOST_ROWS = 32  # query heads of a kv head times query tokens that one launch takes; more tokens are several launches


@triton.jit
def _owner(tile, share, extra):
    """The program that takes a tile, where the first `extra` programs take share + 1 tiles and the others share."""
    long_part = extra * (share + 1)
    return tl.where(tile < long_part, tile // (share + 1), extra + (tile - long_part) // tl.maximum(share, 1))


@triton.jit
def _attend(
    q, k_ptr, v_ptr, table_ptr, first_tile, last_tile, begin, kv_len, window, scale_log2, cap_log2, cap_inverse, stride_page,
    GROUP: tl.constexpr, NUM_Q: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, LAZY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax of the tiles [first_tile, last_tile): values [ROWS, BLOCK_D], maximum and sum [ROWS].

    With several query tokens a row may have seen no key yet; its maximum is then -inf and its sum 0.

    fp8 comes as words of two neighbouring columns, for what transposes V on its way from shared memory to the matrix unit moves 16 bits.
    Each half of the columns, the even and the odd ones, has products of its own.

    LAZY: every thread sums the weights that it holds, and rows are reduced once, at the end, instead of once a tile.
    """
    WIDTH: tl.constexpr = BLOCK_D // 2 if FP8 else BLOCK_D  # elements of a row as they are loaded
    STRIDE: tl.constexpr = HEAD_DIM // 2 if FP8 else HEAD_DIM
    if FP8:
        q, q_odd = tl.split(tl.reshape(beside_fp8(q), [ROWS, WIDTH, 2]))
        acc_odd = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    columns = tl.arange(0, WIDTH)
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([ROWS, BLOCK_N] if LAZY else [ROWS], dtype=tl.float32)
    # The page of the next tile is read a tile ahead: read in its own tile, it would take half of the pipeline's stages.
    next_page = tl.load(table_ptr + first_tile * BLOCK_N // PAGE)
    for tile in range(first_tile, last_tile):
        start = tile * BLOCK_N
        keys = start + tl.arange(0, BLOCK_N)
        if PAGE % BLOCK_N == 0:
            page = next_page.to(tl.int64)
            next_page = tl.load(table_ptr + (start + BLOCK_N) // PAGE, mask=tile + 1 < last_tile, other=0)
            rows = page * stride_page + ((start % PAGE) + tl.arange(0, BLOCK_N)) * STRIDE
        else:
            page = tl.load(table_ptr + keys // PAGE, mask=keys < kv_len, other=0).to(tl.int64)
            rows = page * stride_page + (keys % PAGE) * STRIDE
        seen = (keys < kv_len) & (keys >= begin)
        # K is transposed by its addresses: mma.sync's operand then comes from shared memory as it lies there
        k = tl.load(k_ptr + rows[None, :] + columns[:, None], mask=seen[None, :] & (columns < STRIDE)[:, None], other=0)
        if FP8:
            k, k_odd = widened_pairs(k, q.dtype, FP8)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if FP8:
            scores = tl.dot(q_odd, k_odd, scores, input_precision=PRECISION)
        if SOFT_CAP:  # cap · tanh(s·scale / cap), in units of log2
            scores = cap_log2 * (1.0 - 2.0 / (tl.exp2(scores * cap_inverse) + 1.0))
        if NUM_Q > 1:
            own = kv_len - NUM_Q + tl.arange(0, ROWS) // GROUP  # a row's own position
            mine = seen[None, :] & (keys[None, :] <= own[:, None])
            if WINDOW:
                mine = mine & (keys[None, :] > own[:, None] - window)
            scores = tl.where(mine, scores, float("-inf"))
        else:
            scores = tl.where(seen[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        # one query sees a key in every tile; of several one may have seen none yet, and exp2(-inf - -inf) is NaN
        base = tl.where(new_max == float("-inf"), 0.0, new_max) if NUM_Q > 1 else new_max
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        decay = tl.exp2(row_max - base)
        row_sum = row_sum * decay[:, None] + weights if LAZY else row_sum * decay + tl.sum(weights, axis=1)
        row_max = new_max
        v = tl.load(v_ptr + rows[:, None] + columns[None, :], mask=seen[:, None] & (columns < STRIDE)[None, :], other=0)
        if FP8:
            v, v_odd = widened_pairs(v, q.dtype, FP8)
            acc_odd = tl.dot(weights.to(v.dtype), v_odd, acc_odd * decay[:, None], input_precision=PRECISION)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    if FP8:
        acc = tl.reshape(tl.join(acc, acc_odd), [ROWS, BLOCK_D])
    if LAZY:
        row_sum = tl.sum(row_sum, axis=1)
    return acc, row_max, row_sum


@triton.jit
def _merge(
    acc_ptr, stats_ptr, out_ptr, first_program, last_program, stride_out,
    GROUP: tl.constexpr, NUM_Q: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The partial softmaxes of one pair: slot 1 of its first program (whose share ends in it), slot 0 of the others.

    PARTS of them are unrolled, so that their loads are in flight together: one after another, each would take the L2 cache's latency.
    """
    heads = tl.arange(0, HEADS)
    columns = tl.arange(0, BLOCK_D)
    inside = (heads < GROUP * NUM_Q)[:, None] & (columns < HEAD_DIM)[None, :]
    cells = heads[:, None] * HEAD_DIM + columns[None, :]
    acc = tl.zeros([HEADS, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([HEADS], -1.0e30, dtype=tl.float32)
    row_sum = tl.zeros([HEADS], dtype=tl.float32)
    for start in range(first_program, last_program + 1, PARTS):
        for offset in tl.static_range(PARTS):
            program = start + offset
            there = program <= last_program
            slot = program * 2 + (program == first_program).to(tl.int32)
            stats = stats_ptr + slot * (2 * ROWS) + heads
            part_max = tl.load(stats, mask=(heads < GROUP * NUM_Q) & there, other=-1.0e30, cache_modifier=".cg")
            part_sum = tl.load(stats + ROWS, mask=(heads < GROUP * NUM_Q) & there, other=0.0, cache_modifier=".cg")
            part = tl.load(acc_ptr + slot * (GROUP * NUM_Q * HEAD_DIM) + cells, mask=inside & there, other=0.0, cache_modifier=".cg")
            new_max = tl.maximum(row_max, part_max)
            decay = tl.exp2(row_max - new_max)
            part_decay = tl.exp2(part_max - new_max)
            acc = acc * decay[:, None] + part * part_decay[:, None]
            row_sum = row_sum * decay + part_sum * part_decay
            row_max = new_max
    if NUM_Q > 1:
        cells = (heads // GROUP)[:, None] * stride_out + (heads % GROUP)[:, None] * HEAD_DIM + columns[None, :]
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a token before the sequence's first
    tl.store(out_ptr + cells, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _keep_part(
    acc, row_max, row_sum, acc_ptr, stats_ptr, slot, rows, columns, inside,
    ROWS: tl.constexpr, CELLS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A partial softmax for the merge. CELLS: rows of it that are used."""
    stats = stats_ptr + slot * (2 * ROWS) + rows
    tl.store(stats, row_max)
    tl.store(stats + ROWS, row_sum)
    tl.store(acc_ptr + (slot * CELLS + rows[:, None]) * HEAD_DIM + columns[None, :], acc, mask=inside)
    tl.debug_barrier()  # all threads have stored before one of them releases


@triton.jit
def _zero_padding(
    kv_lens_ptr, out_ptr, program, num_programs, num_seqs, width,
    CELLS: tl.constexpr,
):  # fmt: skip
    """Rows of sequences that have no keys."""
    cells = tl.arange(0, CELLS)
    for padding in range(program, num_seqs, num_programs):
        if tl.load(kv_lens_ptr + padding) == 0:
            for first in range(0, width, CELLS):
                at = out_ptr + padding * width + first + cells
                tl.store(at, (cells * 0).to(out_ptr.dtype.element_ty), mask=first + cells < width)


@triton.jit
def _pair_of(tile, sequences, lens, first_tiles, num_tiles, ends, num_kv_heads):
    """The (sequence, kv head) pair of a tile: both, the sequence's keys, its first tile, its tiles a head, and where the pair begins."""
    sequence = tl.sum((ends * num_kv_heads <= tile).to(tl.int32), axis=0)
    here = sequences == sequence
    kv_len = tl.sum(tl.where(here, lens, 0), axis=0)
    first_tile = tl.sum(tl.where(here, first_tiles, 0), axis=0)
    pair_tiles = tl.sum(tl.where(here, num_tiles, 0), axis=0)
    sequence_start = tl.sum(tl.where(here, ends - num_tiles, 0), axis=0) * num_kv_heads
    kv_head = (tile - sequence_start) // pair_tiles
    return sequence, kv_head, kv_len, first_tile, pair_tiles, sequence_start + kv_head * pair_tiles


@triton.jit
def _paged_decode_kernel(
    q_ptr, kv_ptr, block_table_ptr, kv_lens_ptr, out_ptr, acc_ptr, stats_ptr, counters_ptr, scales_ptr,
    stride_q, stride_q_token, stride_q_head, stride_kv, stride_page, stride_table, num_seqs, num_kv_heads,
    scale_log2, cap_log2, cap_inverse, window,
    GROUP: tl.constexpr, NUM_Q: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SEQS_BLOCK: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, LAZY: tl.constexpr, PRECISION: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    sequences = tl.arange(0, SEQS_BLOCK)
    lens = tl.load(kv_lens_ptr + sequences, mask=sequences < num_seqs, other=0)
    first_tiles = tl.maximum(lens - window - (NUM_Q - 1), 0) // BLOCK_N if WINDOW else lens * 0
    num_tiles = tl.cdiv(lens, BLOCK_N) - first_tiles
    ends = tl.cumsum(num_tiles, axis=0)
    total = tl.sum(num_tiles, axis=0) * num_kv_heads
    program = tl.program_id(0)
    share = total // tl.num_programs(0)
    extra = total % tl.num_programs(0)
    tile = program * share + tl.minimum(program, extra)
    last = tile + share + (program < extra).to(tl.int32)

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < GROUP * NUM_Q)[:, None] & (columns < HEAD_DIM)[None, :]
    while tile < last:
        sequence, kv_head, kv_len, first_tile, pair_tiles, pair_start = _pair_of(
            tile, sequences, lens, first_tiles, num_tiles, ends, num_kv_heads
        )
        begins = tile - pair_start
        stops = tl.minimum(pair_tiles, last - pair_start)

        head = kv_head * GROUP + (rows if NUM_Q == 1 else rows % GROUP)
        row = sequence.to(tl.int64)
        from_ptr = q_ptr + row * stride_q
        if NUM_Q > 1:
            from_ptr += (rows // GROUP)[:, None] * stride_q_token
        q = tl.load(from_ptr + head[:, None] * stride_q_head + columns[None, :], mask=inside, other=0.0)
        k_ptr = kv_ptr + kv_head * (PAGE * HEAD_DIM // 2 if FP8 else PAGE * HEAD_DIM)
        begin = tl.maximum(kv_len - window - (NUM_Q - 1), 0) if WINDOW else 0
        k_scale = tl.load(scales_ptr + kv_head) if scales_ptr is not None else 1.0
        acc, row_max, row_sum = _attend(
            q, k_ptr, k_ptr + stride_kv, block_table_ptr + row * stride_table, first_tile + begins, first_tile + stops, begin, kv_len,
            window, scale_log2 if SOFT_CAP else scale_log2 * k_scale, cap_log2, cap_inverse * k_scale, stride_page,
            GROUP, NUM_Q, PAGE, HEAD_DIM, ROWS, BLOCK_N, BLOCK_D, WINDOW, SOFT_CAP, FP8, LAZY, PRECISION,
        )  # fmt: skip
        if scales_ptr is not None:
            acc *= tl.load(scales_ptr + num_kv_heads + kv_head)
        token = row if NUM_Q == 1 else (row * NUM_Q + rows // GROUP)[:, None]
        to = out_ptr + (token * num_kv_heads * GROUP + head[:, None]) * HEAD_DIM + columns[None, :]
        if stops - begins == pair_tiles:
            if NUM_Q > 1:
                row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a token before the sequence's first
            tl.store(to, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
        else:
            slot = program * 2 + (begins == 0).to(tl.int32)
            _keep_part(acc, row_max, row_sum, acc_ptr, stats_ptr, slot, rows, columns, inside, ROWS, GROUP * NUM_Q, HEAD_DIM)
            first_program = _owner(pair_start, share, extra)
            last_program = _owner(pair_start + pair_tiles - 1, share, extra)
            counter = counters_ptr + sequence * num_kv_heads + kv_head
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if arrived == last_program - first_program:
                pair_out = out_ptr + (row * NUM_Q * num_kv_heads + kv_head) * GROUP * HEAD_DIM
                _merge(
                    acc_ptr, stats_ptr, pair_out, first_program, last_program, num_kv_heads * GROUP * HEAD_DIM,
                    GROUP, NUM_Q, HEAD_DIM, ROWS, HEADS, PARTS, BLOCK_D,
                )  # fmt: skip
                tl.store(counter, 0)  # as the next launch expects it
        tile = pair_start + stops

    if ZERO:
        if tl.min(tl.where(sequences < num_seqs, lens, 1), axis=0) == 0:
            width = NUM_Q * num_kv_heads * GROUP * HEAD_DIM
            _zero_padding(kv_lens_ptr, out_ptr, program, tl.num_programs(0), num_seqs, width, ROWS * BLOCK_D)


class Tiles(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def tiles(head_dim: int, element_size: int = 2) -> Tiles:
    """As many programs an SM as its shared memory holds, with a few tiles of K and V in flight each.

    A tile is no longer than a page of 64, for one of several pages wants an indirection a key, which takes half of the pipeline's stages.
    """
    if element_size > 2:
        return Tiles(32, 4, 1, 1)
    return Tiles(32 if head_dim > 128 else 64, 4, 3, 2)


def sums_lazily(head_dim: int, rows: int, num_q: int, num_pairs: int, fp8: bool) -> bool:
    """Whether threads keep sums of their own: always over fp8. Over 16 bits it was measured at head_dim 128, where it wins up to 1 % with
    many pairs and loses 2 % with few."""
    return fp8 or (head_dim == 128 and rows <= 16 and num_q == 1 and num_pairs >= MANY_PAIRS)


def fp8_tiles(head_dim: int, rows: int, num_q: int, num_pairs: int, shared: int) -> Tiles:
    """Tiles of half the bytes: more of them in flight, or a third program. num_pairs: (sequence, kv head) pairs, all that the host knows of
    a call's work; shared: bytes that a program may take.

    A third program is worth 1 to 4 % where there is much work. One sequence of 8k gives it too little: three tiles a program instead of
    four, and half as many parts again to merge; 15 % fewer bytes a second. 8 and 64 pairs were measured; between them is a guess.
    The third fits beside 168 registers (one query token, 16 rows) and with 227 KB of shared memory.
    """
    if head_dim > 128:
        return Tiles(64 if rows <= 16 else 32, 4, 3, 2)
    if num_pairs >= MANY_PAIRS and num_q == 1 and rows <= 16 and shared >= 200_000:
        return Tiles(64, 4, 4, 3)
    return Tiles(64 if rows <= 32 else 32, 4, 5, 2)


def paged_decode(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    max_kv_len: int,
    scale: float,
    sliding_window: int = 0,
    logit_soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [num_seqs, num_heads, head_dim] or [num_seqs, num_q, num_heads, head_dim], bf16/fp16 -> out of the same shape, contiguous.
    Rows of a sequence of length 0 (padding) are 0, or stay as they are in out where that is given. head_dim is 256 at most.

    kv_pages [2, num_pages, num_kv_heads, page_size, head_dim], pages contiguous; block_table int32 [num_seqs, max_pages];
    kv_lens int32 [num_seqs], with the new tokens, at most max_kv_len. The queries are the last num_q positions, and see what is not
    behind them. sliding_window 0: none, else a query sees the last `window` keys up to its own. logit_soft_cap 0: none, else scores
    become cap · tanh(score / cap). scale > 0. kv_pages may be float8_e4m3fn: numbers are stored ·
    kv_scales (fp32 [2, num_kv_heads], None: 1).

    Safe in a CUDA graph after one call outside of it. Graphs that hold it are to be replayed one at a time on a device.
    """
    if q.shape[-1] > 256:
        raise ValueError(f"paged_decode has no kernel for head_dim {q.shape[-1]}; flash_prefill takes more than 256")
    queries = q.unsqueeze(1) if q.dim() == 3 else q
    zero = out is None
    out = torch.empty(queries.shape, dtype=q.dtype, device=q.device) if out is None else out.view(queries.shape)
    num_q = queries.shape[1]
    each = max(1, MOST_ROWS // (queries.shape[2] // kv_pages.shape[2]))  # query tokens a launch
    for first in range(0, num_q if len(q) else 0, each):
        last = min(first + each, num_q)
        whole = last - first == num_q
        lens = kv_lens if last == num_q else (kv_lens - (num_q - last)).clamp_(min=0)
        part = out if whole else out[:, first:last].contiguous()
        _launch(
            queries[:, first:last], kv_pages, block_table, lens, part, max_kv_len, scale, sliding_window, logit_soft_cap, kv_scales, zero
        )
        if not whole:
            out[:, first:last] = part
    return out.view(q.shape)


def _launch(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    out: torch.Tensor,
    max_kv_len: int,
    scale: float,
    sliding_window: int,
    logit_soft_cap: float,
    kv_scales: torch.Tensor | None,
    zero: bool,
) -> None:
    """q, out [num_seqs, num_q, num_heads, head_dim]; out contiguous. zero: whether rows without keys become 0, or stay."""
    num_seqs, num_q, num_heads, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[2], kv_pages.shape[3]
    kv_pages, fp8 = readable(kv_pages)
    if fp8:
        kv_pages = kv_pages.view(torch.int16)
    group = num_heads // num_kv_heads
    heads = triton.next_power_of_2(group * num_q)
    rows = max(16, heads)
    num_pairs = num_seqs * num_kv_heads
    tile = tiles(head_dim, q.element_size())
    if fp8 != NOT_FP8 and q.element_size() == 2:
        tile = fp8_tiles(head_dim, rows, num_q, num_pairs, shared_bytes(q.device))
    parts = max(1, min(16, MERGE_CELLS // (heads * triton.next_power_of_2(head_dim))))
    programs = min(num_pairs * triton.cdiv(max_kv_len, tile.block_n), num_sms(q.device) * tile.programs_per_sm)
    acc = torch.empty((programs * 2, group * num_q, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((programs * 2, 2, rows), dtype=torch.float32, device=q.device)
    capped = logit_soft_cap > 0
    _paged_decode_kernel[(programs,)](
        q, kv_pages, block_table, kv_lens, out, acc, stats, zeroed_counters(q.device, num_pairs), kv_scales if fp8 else None,
        q.stride(0), q.stride(1) if num_q > 1 else None, q.stride(2),
        kv_pages.stride(0), kv_pages.stride(1), block_table.stride(0), num_seqs, num_kv_heads,
        1.0 if capped else scale * LOG2_E, logit_soft_cap * LOG2_E, 2 * LOG2_E * scale / logit_soft_cap if capped else 0.0, sliding_window,
        GROUP=group, NUM_Q=num_q, PAGE=page_size, HEAD_DIM=head_dim, ROWS=rows, BLOCK_N=tile.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim), SEQS_BLOCK=max(16, triton.next_power_of_2(num_seqs)), HEADS=heads, PARTS=parts,
        WINDOW=sliding_window > 0, SOFT_CAP=capped, FP8=fp8, LAZY=sums_lazily(head_dim, rows, num_q, num_pairs, fp8 != NOT_FP8),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", ZERO=zero, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
