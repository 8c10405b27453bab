"""Prefill attention on Hopper for head dimensions of 512 and 1024: portable/wide_prefill.py's two passes as two matrix products in Gluon.

scores   Q[128, 64] · K[256 keys, 64]ᵀ over the head dimension    ─► 2^(score − reference) in 16 bits, reference and sum ─► memory
values   weights[128, 64 keys] · V[64 keys, 256 columns] over the keys                                     / sum of the row ─► out

producer     item ─► slots of both operands, page by page ...             tensor copies; a few slots ahead, into the next item
consumer 0   rows 0-63     ... product, one step always in flight ─► epilogue                                          wgmma
consumer 1   rows 64-127   ...

One program an SM walks its items. A tile's reference is its row's maximum, down to a multiple of 8: weights are 16-bit floats below 2^8, of
the same relative error whatever the reference, and tiles of one row mostly share theirs. Where they do not, the second pass scales its
weights on their way, in shared memory and exactly, by a power of 2. A strip is as many queries as WORKSPACE_BYTES hold the weights of.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..portable.device import num_sms
from .product import BLOCK_M, STEP, barriers, field, multiply, publish, quarter, send

LOG2_E = 1.4426950408889634
BLOCK_GROUP = gl.constexpr(8)  # blocks of queries that read a tile of keys one behind the other, while the L2 cache has it
QUANTUM = gl.constexpr(8.0)  # of references: 2^8 times a row's keys is far from fp32's end, and 2^8 from fp16's
LOWEST = gl.constexpr(-1.0e30)  # the reference of a row that sees no key of a tile
WORKSPACE_BYTES = 1 << 30
PER_CALL = ("num_items", "first_block", "count", "num_tiles")  # their values are nothing to compile for


@gluon.jit
def _block(cu_seqlens_q_ptr, kv_lens_ptr, sequence, block, CAUSAL: gl.constexpr):
    """Of a block of queries: its first token, its sequence's queries from there on, keys, first position, and the keys that it sees."""
    first_token = gl.load(cu_seqlens_q_ptr + sequence)
    q_len = gl.load(cu_seqlens_q_ptr + sequence + 1) - first_token
    kv_len = gl.load(kv_lens_ptr + sequence)
    position = kv_len - q_len + block * BLOCK_M
    end = kv_len
    if CAUSAL:
        end = gl.minimum(kv_len, position + BLOCK_M)
    return first_token + block * BLOCK_M, q_len - block * BLOCK_M, kv_len, position, end


@gluon.jit
def _produce_scores(
    q_desc, kv_desc, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr,
    num_items, first_block, count, num_heads, num_tiles, group, num_kv_heads, stride_table,
    q_smem, k_smem, full, empty, info_smem, info_full, info_empty,
    D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    slot = 0
    phase = 1
    info_slot = 0
    info_phase = 1
    item = gl.program_id(0)
    while item < num_items:
        pair = item // (count * num_tiles)
        place = item % (count * num_tiles)
        strip_block = place // (BLOCK_GROUP * num_tiles) * BLOCK_GROUP
        place -= strip_block * num_tiles
        lanes = gl.minimum(BLOCK_GROUP, count - strip_block)
        strip_block += place % lanes
        tile = place // lanes
        sequence = pair // num_heads
        head = pair % num_heads
        token, num_rows, kv_len, position, end = _block(cu_seqlens_q_ptr, kv_lens_ptr, sequence, first_block + strip_block, CAUSAL)
        if num_rows > 0 and tile * KEYS < end:
            mbarrier.wait(info_empty.index(info_slot), info_phase)
            publish(info_smem, info_full, info_slot, 1, pair * count + strip_block, tile, position, kv_len, 0)
            info_slot ^= 1
            if info_slot == 0:
                info_phase ^= 1
            table_ptr = block_table_ptr + sequence.to(gl.int64) * stride_table
            last_page = (kv_len - 1) // PAGE
            rows = ()
            for c in gl.static_range(KEYS // BOX):
                # a page beyond the sequence's last is not its own: the last stands in, and the mask hides it
                page = gl.load(table_ptr + gl.minimum((tile * KEYS + c * BOX) // PAGE, last_page))
                rows = rows + ((page * num_kv_heads + head // group) * PAGE + (tile * KEYS + c * BOX) % PAGE,)  # noqa: RUF005 - no * in Gluon
            for step in range(D // STEP):
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(full.index(slot), (BLOCK_M + KEYS) * STEP * 2)
                tma.async_copy_global_to_shared(q_desc, [token, head * D + step * STEP], full.index(slot), q_smem.index(slot))
                for c in gl.static_range(KEYS // BOX):
                    to = k_smem.index(slot).slice(c * BOX, BOX)
                    tma.async_copy_global_to_shared(kv_desc, [rows[c], step * STEP], full.index(slot), to)
                slot += 1
                if slot == SLOTS:
                    slot = 0
                    phase ^= 1
        item += gl.num_programs(0)
    mbarrier.wait(info_empty.index(info_slot), info_phase)
    publish(info_smem, info_full, info_slot, 0, 0, 0, 0, 0, 0)


@gluon.jit
def _consume_scores(
    weights_desc, stats_ptr, num_tiles, scale_log2,
    q_smem, k_smem, out_smem, full, empty, info_smem, info_full, info_empty,
    D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    INFO: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    rows = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    part_rows = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, PART))
    slot = 0
    phase = 0
    info_slot = 0
    info_phase = 0
    mbarrier.wait(info_full.index(0), 0)
    info = info_smem.index(0).load(INFO)
    while field(info, 0) > 0:
        place = field(info, 1)
        tile = field(info, 2)
        position = field(info, 3)
        kv_len = field(info, 4)
        mbarrier.arrive(info_empty.index(info_slot), count=1)
        info_slot ^= 1
        if info_slot == 0:
            info_phase ^= 1
        scores, slot, phase = multiply(q_smem, k_smem, full, empty, D // STEP, slot, phase, KEYS, SLOTS, WHICH, True, LAYOUT)
        whole_end = kv_len
        if CAUSAL:
            whole_end = gl.minimum(kv_len, position + WHICH * 64 + 1)
        if (tile + 1) * KEYS > whole_end:
            limits = gl.full([64], 0, gl.int32, gl.SliceLayout(1, LAYOUT)) + kv_len - 1
            if CAUSAL:
                limits = gl.minimum(limits, position + rows)
            keys = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
            scores = gl.where(keys[None, :] <= limits[:, None], scores, float("-inf"))
        row_max = gl.convert_layout(gl.max(scores, axis=1), gl.SliceLayout(1, PART)) * scale_log2
        reference = gl.where(row_max == float("-inf"), LOWEST, gl.floor(row_max / QUANTUM) * QUANTUM)
        base = gl.where(row_max == float("-inf"), 0.0, reference)
        row_sum = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, PART))
        for n in gl.static_range(KEYS // 64):
            weights = gl.exp2(quarter(scores, n, PART) * scale_log2 - base[:, None])
            row_sum += gl.sum(weights, axis=1)
            send(weights, weights_desc, out_smem, place * BLOCK_M + WHICH * 64, tile * KEYS + n * 64, n, STAGES, WHICH)
        stats = stats_ptr + (place * num_tiles + tile) * (2 * BLOCK_M) + part_rows
        gl.store(stats, reference)
        gl.store(stats + BLOCK_M, row_sum)
        mbarrier.wait(info_full.index(info_slot), info_phase)
        info = info_smem.index(info_slot).load(INFO)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=PER_CALL)
def _scores_kernel(
    q_desc, kv_desc, weights_desc, stats_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr,
    num_items, first_block, count, num_heads, num_tiles, group, num_kv_heads, stride_table, scale_log2,
    D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, CAUSAL: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, STEP], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, STEP], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, STEP], k_layout)
    out_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], weights_desc.layout)
    info_smem = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty, info_full, info_empty = barriers(SLOTS)
    gl.warp_specialize([
        (_produce_scores, (
            q_desc, kv_desc, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr,
            num_items, first_block, count, num_heads, num_tiles, group, num_kv_heads, stride_table,
            q_smem, k_smem, full, empty, info_smem, info_full, info_empty, D, KEYS, SLOTS, PAGE, BOX, CAUSAL,
        )),
        (_consume_scores, (
            weights_desc, stats_ptr, num_tiles, scale_log2,
            q_smem, k_smem, out_smem, full, empty, info_smem, info_full, info_empty, D, KEYS, SLOTS, STAGES, CAUSAL, 0,
        )),
        (_consume_scores, (
            weights_desc, stats_ptr, num_tiles, scale_log2,
            q_smem, k_smem, out_smem, full, empty, info_smem, info_full, info_empty, D, KEYS, SLOTS, STAGES, CAUSAL, 1,
        )),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip


@gluon.jit
def _row_stats(stats_ptr, num_tiles):
    """Of 128 rows: the highest of their tiles' references, 1 / the sum of their weights relative to it, and whether references differ."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [0, 1])
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    lanes = gl.arange(0, 4, gl.SliceLayout(0, LAYOUT))
    highest = gl.full([BLOCK_M], LOWEST, gl.float32, gl.SliceLayout(1, LAYOUT))
    lowest = gl.full([BLOCK_M], 1.0e30, gl.float32, gl.SliceLayout(1, LAYOUT))
    row_sum = gl.full([BLOCK_M], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
    for first in range(0, num_tiles, 4):
        tiles = first + lanes[None, :] + rows[:, None] * 0
        at = stats_ptr + tiles * (2 * BLOCK_M) + rows[:, None]
        references = gl.load(at, mask=tiles < num_tiles, other=LOWEST)
        sums = gl.load(at + BLOCK_M, mask=tiles < num_tiles, other=0.0)
        higher = gl.maximum(highest, gl.max(references, axis=1))
        row_sum = row_sum * gl.exp2(highest - higher) + gl.sum(sums * gl.exp2(references - higher[:, None]), axis=1)
        lowest = gl.minimum(lowest, gl.min(gl.where(references == LOWEST, 1.0e30, references), axis=1))
        highest = higher
    differ = gl.max(gl.where(lowest < highest, 1, 0), axis=0)
    return highest, gl.where(row_sum == 0.0, 0.0, 1.0 / row_sum), differ


@gluon.jit
def _produce_values(
    weights_desc, kv_desc, stats_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr,
    num_items, first_block, count, num_heads, num_tiles, group, num_kv_heads, num_pages, stride_table,
    w_smem, v_smem, rows_smem, full, empty, info_smem, info_full, info_empty,
    D: gl.constexpr, KEYS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    slot = 0
    phase = 1
    info_slot = 0
    info_phase = 1
    item = gl.program_id(0)
    while item < num_items:
        # the columns of a block are neighbours: they read the same weights; causal blocks come longest first
        column = item % (D // COLUMNS) * COLUMNS
        strip_block = count - 1 - item // (D // COLUMNS) % count
        pair = item // (D // COLUMNS * count)
        sequence = pair // num_heads
        head = pair % num_heads
        token, num_rows, kv_len, _, end = _block(cu_seqlens_q_ptr, kv_lens_ptr, sequence, first_block + strip_block, CAUSAL)
        if num_rows > 0 and end > 0:
            place = pair * count + strip_block
            num_steps = gl.cdiv(end, STEP)
            highest, inverse, differ = _row_stats(stats_ptr + place * num_tiles * (2 * BLOCK_M), gl.cdiv(end, KEYS))
            mbarrier.wait(info_empty.index(info_slot), info_phase)
            rows_smem.index(info_slot * 2).store(highest)
            rows_smem.index(info_slot * 2 + 1).store(inverse)
            publish(info_smem, info_full, info_slot, num_steps, place, token, num_rows, (head * D + column) // 64, differ)
            info_slot ^= 1
            if info_slot == 0:
                info_phase ^= 1
            table_ptr = block_table_ptr + sequence.to(gl.int64) * stride_table
            last_page = (kv_len - 1) // PAGE
            for step in range(num_steps):
                rows = ()
                for c in gl.static_range(STEP // BOX):
                    # weights behind the sequence's last key are 0: the last page stands in for those beyond it
                    page = num_pages + gl.load(table_ptr + gl.minimum((step * STEP + c * BOX) // PAGE, last_page))
                    rows = rows + ((page * num_kv_heads + head // group) * PAGE + (step * STEP + c * BOX) % PAGE,)  # noqa: RUF005
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(full.index(slot), (BLOCK_M + COLUMNS) * STEP * 2)
                tma.async_copy_global_to_shared(weights_desc, [place * BLOCK_M, step * STEP], full.index(slot), w_smem.index(slot))
                for c in gl.static_range(STEP // BOX):
                    to = v_smem.index(slot).slice(c * BOX, BOX)
                    tma.async_copy_global_to_shared(kv_desc, [rows[c], column], full.index(slot), to)
                slot += 1
                if slot == SLOTS:
                    slot = 0
                    phase ^= 1
        item += gl.num_programs(0)
    mbarrier.wait(info_empty.index(info_slot), info_phase)
    publish(info_smem, info_full, info_slot, 0, 0, 0, 0, 0, 0)


@gluon.jit
def _multiply_scaled(
    w_smem, v_smem, full, empty, stats_ptr, highest, num_steps, slot, phase,
    N: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr, WHICH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """As multiply, for tiles of unlike references: their weights are scaled to the row's highest in shared memory first."""
    W_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    stats = stats_ptr + WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, W_LAYOUT))
    acc = gl.zeros([64, N], gl.float32, LAYOUT)
    for step in range(num_steps):
        factor = gl.exp2(gl.load(stats + step * STEP // KEYS * (2 * BLOCK_M)) - highest)
        mbarrier.wait(full.index(slot), phase)
        w = w_smem.index(slot).slice(WHICH * 64, 64)
        w.store((w.load(W_LAYOUT).to(gl.float32) * factor[:, None]).to(w_smem.dtype))
        fence_async_shared()
        acc = warpgroup_mma(w, v_smem.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(slot), count=1)
        slot += 1
        if slot == SLOTS:
            slot = 0
            phase ^= 1
    return acc, slot, phase


@gluon.jit
def _consume_values(
    out_desc, out_ptr, stats_ptr, num_heads, num_tiles,
    w_smem, v_smem, out_smem, rows_smem, full, empty, info_smem, info_full, info_empty,
    D: gl.constexpr, KEYS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    W_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    INFO: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    out_rows = gl.arange(0, 64, gl.SliceLayout(1, PART))
    columns = gl.arange(0, 64, gl.SliceLayout(0, PART))
    slot = 0
    phase = 0
    info_slot = 0
    info_phase = 0
    mbarrier.wait(info_full.index(0), 0)
    info = info_smem.index(0).load(INFO)
    num_steps = field(info, 0)
    while num_steps > 0:
        stats = stats_ptr + field(info, 1) * num_tiles * (2 * BLOCK_M)
        token = field(info, 2) + WHICH * 64
        num_rows = field(info, 3) - WHICH * 64
        column = field(info, 4) * 64
        differ = field(info, 5)
        highest = rows_smem.index(info_slot * 2).slice(WHICH * 64, 64).load(gl.SliceLayout(1, W_LAYOUT))
        inverse = rows_smem.index(info_slot * 2 + 1).slice(WHICH * 64, 64).load(gl.SliceLayout(1, PART))
        mbarrier.arrive(info_empty.index(info_slot), count=1)
        info_slot ^= 1
        if info_slot == 0:
            info_phase ^= 1
        if differ > 0:
            acc, slot, phase = _multiply_scaled(
                w_smem, v_smem, full, empty, stats, highest, num_steps, slot, phase, COLUMNS, KEYS, SLOTS, WHICH, LAYOUT
            )
        else:
            acc, slot, phase = multiply(w_smem, v_smem, full, empty, num_steps, slot, phase, COLUMNS, SLOTS, WHICH, False, LAYOUT)
        for n in gl.static_range(COLUMNS // 64):
            part = quarter(acc, n, PART) * inverse[:, None]
            if num_rows >= 64:
                send(part, out_desc, out_smem, token, column + n * 64, n, STAGES, WHICH)
            else:  # rows beyond the sequence's own belong to the next
                to = out_ptr + (token + out_rows).to(gl.int64)[:, None] * (num_heads * D) + (column + n * 64 + columns)[None, :]
                gl.store(to, part.to(out_desc.dtype), mask=(out_rows < num_rows)[:, None])
        mbarrier.wait(info_full.index(info_slot), info_phase)
        info = info_smem.index(info_slot).load(INFO)
        num_steps = field(info, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=PER_CALL)
def _values_kernel(
    weights_desc, kv_desc, out_desc, out_ptr, stats_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr,
    num_items, first_block, count, num_heads, num_tiles, group, num_kv_heads, num_pages, stride_table,
    D: gl.constexpr, KEYS: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = out_desc.dtype
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, COLUMNS], dtype)
    w_smem = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, STEP], weights_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [SLOTS, STEP, COLUMNS], v_layout)
    out_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], out_desc.layout)
    rows_smem = gl.allocate_shared_memory(gl.float32, [4, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    info_smem = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty, info_full, info_empty = barriers(SLOTS)
    gl.warp_specialize([
        (_produce_values, (
            weights_desc, kv_desc, stats_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr,
            num_items, first_block, count, num_heads, num_tiles, group, num_kv_heads, num_pages, stride_table,
            w_smem, v_smem, rows_smem, full, empty, info_smem, info_full, info_empty, D, KEYS, COLUMNS, SLOTS, PAGE, BOX, CAUSAL,
        )),
        (_consume_values, (
            out_desc, out_ptr, stats_ptr, num_heads, num_tiles,
            w_smem, v_smem, out_smem, rows_smem, full, empty, info_smem, info_full, info_empty, D, KEYS, COLUMNS, SLOTS, STAGES, 0,
        )),
        (_consume_values, (
            out_desc, out_ptr, stats_ptr, num_heads, num_tiles,
            w_smem, v_smem, out_smem, rows_smem, full, empty, info_smem, info_full, info_empty, D, KEYS, COLUMNS, SLOTS, STAGES, 1,
        )),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip


class Tiles(NamedTuple):
    keys: int = 256  # of a program, in scores
    columns: int = 256  # of a program, in values
    slots: int = 4  # of both operands
    stages: int = 2  # of a consumer's way out, 64 x 64 each
    registers: int = 224  # of a consumer's thread
    persistent: bool = True


TILES = Tiles()


@lru_cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)  # pyright: ignore[reportReturnType] - a constexpr function


def _descriptor(tensor: torch.Tensor, rows: int, width: int, row_stride: int, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, [rows, width], [row_stride, 1], box, _layout(*box, tensor.dtype))


def wide_prefill(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_kv_len: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """As hopper/flash_prefill.py, whose conditions hold, for a head_dim that is a multiple of 256."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_pages, num_kv_heads, page_size, _ = kv_pages.shape
    pairs, width, box = kv_lens.shape[0] * num_heads, num_heads * head_dim, min(64, page_size)
    num_blocks, num_tiles = -(-max_seqlen_q // BLOCK_M.value), -(-max_kv_len // TILES.keys)
    strip = max(1, min(num_blocks, WORKSPACE_BYTES // (pairs * BLOCK_M.value * num_tiles * TILES.keys * 2)))
    rows = pairs * strip * BLOCK_M.value
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    weights = torch.empty((rows, num_tiles * TILES.keys), dtype=q.dtype, device=q.device)
    stats = torch.empty(rows * num_tiles * 2, dtype=torch.float32, device=q.device)
    kv_rows, row_width = 2 * num_pages * num_kv_heads * page_size, num_tiles * TILES.keys
    q_desc = _descriptor(q, num_tokens, width, q.stride(0), [BLOCK_M.value, STEP.value])
    k_desc = _descriptor(kv_pages, kv_rows, head_dim, head_dim, [box, STEP.value])
    v_desc = _descriptor(kv_pages, kv_rows, head_dim, head_dim, [box, TILES.columns])
    write_desc = _descriptor(weights, rows, row_width, row_width, [64, 64])
    read_desc = _descriptor(weights, rows, row_width, row_width, [BLOCK_M.value, STEP.value])
    out_desc = _descriptor(out, num_tokens, width, width, [64, 64])
    common = {
        "D": head_dim, "KEYS": TILES.keys, "SLOTS": TILES.slots, "PAGE": page_size, "BOX": box, "CAUSAL": causal,
        "STAGES": TILES.stages, "REGISTERS": TILES.registers, "num_warps": 4,
    }  # fmt: skip
    for first in range(0, num_blocks, strip):
        count = min(strip, num_blocks - first)
        shape = (first, count, num_heads, num_tiles, num_heads // num_kv_heads, num_kv_heads)
        items, programs = pairs * count * num_tiles, num_sms(q.device)
        _scores_kernel[(min(programs, items) if TILES.persistent else items,)](
            q_desc, k_desc, write_desc, stats, block_table, cu_seqlens_q, kv_lens, items, *shape, block_table.stride(0), scale * LOG2_E,
            **common,
        )  # fmt: skip
        items = pairs * count * (head_dim // TILES.columns)
        _values_kernel[(min(programs, items) if TILES.persistent else items,)](
            read_desc, v_desc, out_desc, out, stats, block_table, cu_seqlens_q, kv_lens, items, *shape, num_pages, block_table.stride(0),
            COLUMNS=TILES.columns, **common,
        )  # fmt: skip
    return out
