"""Prefill attention on Hopper: FlashAttention-3's schedule in Gluon, over paged keys and values.

producer     next item ─► Q ─► K(n-1) V(n-1) K(n-2) V(n-2) ... K(0) V(0) ─► next item ...       tensor copies, a page each
                          │        two slots of K and two of V
consumer 0   rows 0-63    QK(n-1) │ QK(j-1) under softmax(j) under PV(j) │ ... PV(0) │ out       wgmma; mask on the diagonal's tiles only
consumer 1   rows 64-127  QK(n-1) │ ...

One program an SM stays for the whole call and draws its items (128 queries of a head) from a counter, the longest of a head first. The
heads whose keys and values fit in the L2 cache together are worked off together. The producer tells the consumers of an item through
a ring in shared memory, and loads the next item's tiles while they finish the last.

Schedule: Shah et al., FlashAttention-3 (arXiv 2407.08608). Keys go from the diagonal backwards.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..portable.counters import zeroed_counters
from ..portable.device import num_sms
from ..portable.flash_prefill import flash_prefill as portable_flash_prefill
from ..portable.flash_prefill import num_splits
from ..portable.widen import widened_bytes, widened_pages
from .exponential import exp2_on_both_units
from .wide_prefill import wide_prefill

LOG2_E = 1.4426950408889634
BLOCK_M = gl.constexpr(128)
LOWEST = gl.constexpr(-1.0e30)  # a row that has seen no key yet has this maximum: with -inf it would meet inf - inf
L2_BYTES = 32 << 20
WIDENED_BYTES = 1 << 30  # of memory for fp8 pages in 16 bits
WIDENING_ROWS = 512  # rows of queries (tokens times heads) a kv head and sequence, from which on widening them pays


@gluon.jit
def _find_sequence(cu_seqlens_q_ptr, num_seqs, block):
    """The sequence of a virtual block: sequence s owns the blocks from cu_seqlens_q[s] // BLOCK_M + s on, at least as many as it needs."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(cu_seqlens_q_ptr + middle) // BLOCK_M + middle <= block:
            low = middle
        else:
            high = middle
    return low


@gluon.jit
def _find_item(cu_seqlens_q_ptr, kv_lens_ptr, item, num_seqs, num_heads, section):
    """An item's sequence, head, first row in its sequence, and that sequence's first token, queries and keys."""
    sequence = _find_sequence(cu_seqlens_q_ptr, num_seqs, item // num_heads)
    first_token = gl.load(cu_seqlens_q_ptr + sequence)
    next_token = gl.load(cu_seqlens_q_ptr + sequence + 1)
    kv_len = gl.load(kv_lens_ptr + sequence)
    q_len = next_token - first_token
    first_block = first_token // BLOCK_M + sequence
    num_blocks = next_token // BLOCK_M + sequence + 1 - first_block
    place = item - first_block * num_heads
    head = place // (section * num_blocks) * section
    place -= head * num_blocks
    lanes = gl.maximum(gl.minimum(section, num_heads - head), 1)
    head += place % lanes
    row = (num_blocks - 1 - place // lanes) * BLOCK_M
    return sequence, head, row, first_token, q_len, kv_len


@gluon.jit
def _load_tile(
    kv_desc, table_ptr, key, last_page, kv_head, num_kv_heads, num_pages, slot, phase, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """The keys [key, key + BLOCK_N) into a slot of K, and their values into one of V, each as soon as it is empty."""
    for part in gl.static_range(2):
        if part == 0:
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), BLOCK_N * D * 2)
        else:
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), BLOCK_N * D * 2)
        for c in gl.static_range(BLOCK_N // BOX):
            # a page beyond the sequence's last is not its own: the last stands in, and the mask hides it
            page = gl.load(table_ptr + gl.minimum((key + c * BOX) // PAGE, last_page))
            at = ((part * num_pages + page) * num_kv_heads + kv_head) * PAGE + (key + c * BOX) % PAGE
            if part == 0:
                to = k_smem.index(slot).slice(c * BOX, BOX)
                tma.async_copy_global_to_shared(kv_desc, [at, 0], k_full.index(slot), to)
            else:
                to = v_smem.index(slot).slice(c * BOX, BOX)
                tma.async_copy_global_to_shared(kv_desc, [at, 0], v_full.index(slot), to)


@gluon.jit
def _produce(
    q_desc, kv_desc, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr, counter_ptr,
    num_items, num_seqs, num_heads, section, group, num_kv_heads, num_pages, stride_table,
    q_smem, k_smem, v_smem, info_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, info_full, info_empty,
    D: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    INFO: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    fields = gl.arange(0, 8, INFO)
    slot = 0
    phase = 1
    info_slot = 0
    info_phase = 1
    q_phase = 1
    item = gl.atomic_add(counter_ptr, 1)
    while item < num_items:
        sequence, head, row, first_token, q_len, kv_len = _find_item(cu_seqlens_q_ptr, kv_lens_ptr, item, num_seqs, num_heads, section)
        # else a block that the sequence does not need, tokens behind the last sequence, or rows that another kernel writes
        if row < q_len and head < num_heads and kv_len > 0:
            position = kv_len - q_len + row
            end = kv_len
            if CAUSAL:
                end = gl.minimum(kv_len, position + BLOCK_M)
            num_tiles = gl.cdiv(end, BLOCK_N)
            mbarrier.wait(info_empty.index(info_slot), info_phase)
            info = gl.where(fields == 0, num_tiles, 0) + gl.where(fields == 1, first_token + row, 0) + gl.where(fields == 2, q_len - row, 0)
            info += gl.where(fields == 3, position, 0) + gl.where(fields == 4, kv_len, 0) + gl.where(fields == 5, head, 0)
            info_smem.index(info_slot).store(info)
            mbarrier.arrive(info_full.index(info_slot), count=1)
            info_slot ^= 1
            if info_slot == 0:
                info_phase ^= 1
            for c in gl.static_range(2):
                mbarrier.wait(q_empty.index(c), q_phase)
                mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(q_desc, [first_token + row + c * 64, head * D], q_full.index(c), q_smem.index(c))
            q_phase ^= 1
            table_ptr = block_table_ptr + sequence.to(gl.int64) * stride_table
            last_page = (kv_len - 1) // PAGE
            kv_head = head // group
            for t in range(num_tiles):
                key = (num_tiles - 1 - t) * BLOCK_N
                _load_tile(
                    kv_desc, table_ptr, key, last_page, kv_head, num_kv_heads, num_pages, slot, phase,
                    k_smem, v_smem, k_full, k_empty, v_full, v_empty, D, BLOCK_N, PAGE, BOX,
                )  # fmt: skip
                slot += 1
                if slot == SLOTS:
                    slot = 0
                    phase ^= 1
        item = gl.atomic_add(counter_ptr, 1)
    if item == num_items + gl.num_programs(0) - 1:  # the last draw of all: leave the counter as it was found
        gl.store(counter_ptr, 0)
    mbarrier.wait(info_empty.index(info_slot), info_phase)
    info_smem.index(info_slot).store(gl.zeros([8], gl.int32, INFO))
    mbarrier.arrive(info_full.index(info_slot), count=1)


@gluon.jit
def _softmax(scores, row_max, row_sum, scale_log2, BOTH_UNITS: gl.constexpr):
    """A tile of scores into the running maximum (at least LOWEST, in units of log2) and sum: weights, both, and what the past decays by."""
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale_log2)
    weights = scores * scale_log2 - new_max[:, None]
    weights = exp2_on_both_units(weights) if BOTH_UNITS else gl.exp2(weights)
    decay = gl.exp2(row_max - new_max)
    return weights, new_max, row_sum * decay + gl.sum(weights, axis=1), decay


@gluon.jit
def _step(
    acc, weights, row_max, row_sum, tile, limits, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    k_slot, k_phase, v_slot, v_phase, scale_log2,
    D: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """QK of this tile is issued, then PV of the one before; the softmax runs under the latter.

    The weights are handed on in fp32: as bf16 each would take a register of its own until it is packed for the product.
    """
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    mbarrier.wait(k_full.index(k_slot), k_phase)
    started = warpgroup_mma(
        q, k_smem.index(k_slot).permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT), use_acc=False, is_async=True
    )
    mbarrier.wait(v_full.index(v_slot), v_phase)
    operand = gl.convert_layout(weights.to(v_smem.dtype), P_LAYOUT)
    weighted = warpgroup_mma(operand, v_smem.index(v_slot), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(started,))
    mbarrier.arrive(k_empty.index(k_slot), count=1)
    if MASK:
        keys = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
        scores = gl.where(keys[None, :] <= limits[:, None], scores, float("-inf"))
    weights, row_max, row_sum, decay = _softmax(scores, row_max, row_sum, scale_log2, D == 64)
    # The weights stand among the dependencies so that the assembler cannot move their arithmetic behind the wait.
    acc, operand, weights = warpgroup_mma_wait(0, deps=(weighted, operand, weights))
    mbarrier.arrive(v_empty.index(v_slot), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
    k_slot += 1
    if k_slot == SLOTS:
        k_slot = 0
        k_phase ^= 1
    v_slot += 1
    if v_slot == SLOTS:
        v_slot = 0
        v_phase ^= 1
    return acc, weights, row_max, row_sum, k_slot, k_phase, v_slot, v_phase


@gluon.jit
def _field(info, fields, number: gl.constexpr):
    return gl.sum(gl.where(fields == number, info, 0), axis=0)


@gluon.jit
def _store_rows(
    result, out_desc, out_ptr, out_smem, token, num_rows, head, num_heads,
    D: gl.constexpr, O_LAYOUT: gl.constexpr, STAGED: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    if STAGED and num_rows >= 64:
        tma.store_wait(0)
        out_smem.index(WHICH).store(result)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [token, head * D], out_smem.index(WHICH))
    else:  # rows beyond the sequence's own belong to the next
        out_rows = gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
        columns = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
        to = out_ptr + (token + out_rows).to(gl.int64)[:, None] * (num_heads * D) + (head * D + columns)[None, :]
        gl.store(to, result, mask=(out_rows < num_rows)[:, None])


@gluon.jit
def _consume(
    out_desc, out_ptr, num_heads, scale_log2,
    q_smem, k_smem, v_smem, out_smem, info_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, info_full, info_empty,
    D: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, CAUSAL: gl.constexpr, STAGED: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    INFO: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    dtype: gl.constexpr = out_desc.dtype
    fields = gl.arange(0, 8, INFO)
    rows = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
    k_slot = 0
    k_phase = 0
    v_slot = 0
    v_phase = 0
    info_slot = 0
    info_phase = 0
    q_phase = 0
    mbarrier.wait(info_full.index(0), 0)
    info = info_smem.index(0).load(INFO)
    num_tiles = _field(info, fields, 0)
    while num_tiles > 0:
        token = _field(info, fields, 1) + WHICH * 64
        num_rows = _field(info, fields, 2) - WHICH * 64
        position = _field(info, fields, 3)
        kv_len = _field(info, fields, 4)
        head = _field(info, fields, 5)
        mbarrier.arrive(info_empty.index(info_slot), count=1)
        info_slot ^= 1
        if info_slot == 0:
            info_phase ^= 1
        limits = gl.full([64], 0, gl.int32, gl.SliceLayout(1, S_LAYOUT)) + kv_len - 1
        whole_tiles = kv_len // BLOCK_N
        if CAUSAL:
            limits = gl.minimum(limits, position + rows)
            whole_tiles = gl.minimum(kv_len, position + WHICH * 64 + 1) // BLOCK_N

        mbarrier.wait(q_full.index(WHICH), q_phase)
        q_phase ^= 1
        q = q_smem.index(WHICH)
        mbarrier.wait(k_full.index(k_slot), k_phase)
        started = warpgroup_mma(
            q, k_smem.index(k_slot).permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT), use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=(started,))
        mbarrier.arrive(k_empty.index(k_slot), count=1)
        k_slot += 1
        if k_slot == SLOTS:
            k_slot = 0
            k_phase ^= 1
        keys = (num_tiles - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
        scores = gl.where(keys[None, :] <= limits[:, None], scores, float("-inf"))
        row_max = gl.maximum(gl.max(scores, axis=1) * scale_log2, LOWEST)
        weights = gl.exp2(scores * scale_log2 - row_max[:, None])
        row_sum = gl.sum(weights, axis=1)
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)

        tile = num_tiles - 2
        while tile >= whole_tiles:
            acc, weights, row_max, row_sum, k_slot, k_phase, v_slot, v_phase = _step(
                acc, weights, row_max, row_sum, tile, limits, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                k_slot, k_phase, v_slot, v_phase, scale_log2, D, BLOCK_N, SLOTS, S_LAYOUT, O_LAYOUT, True,
            )  # fmt: skip
            tile -= 1
        while tile >= 0:
            acc, weights, row_max, row_sum, k_slot, k_phase, v_slot, v_phase = _step(
                acc, weights, row_max, row_sum, tile, limits, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                k_slot, k_phase, v_slot, v_phase, scale_log2, D, BLOCK_N, SLOTS, S_LAYOUT, O_LAYOUT, False,
            )  # fmt: skip
            tile -= 1
        mbarrier.arrive(q_empty.index(WHICH), count=1)
        mbarrier.wait(v_full.index(v_slot), v_phase)
        operand = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        weighted = warpgroup_mma(operand, v_smem.index(v_slot), acc, is_async=True)
        inverse = gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, O_LAYOUT))
        acc, operand = warpgroup_mma_wait(0, deps=(weighted, operand))
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        v_slot += 1
        if v_slot == SLOTS:
            v_slot = 0
            v_phase ^= 1
        result = (acc * inverse[:, None]).to(dtype)
        _store_rows(result, out_desc, out_ptr, out_smem, token, num_rows, head, num_heads, D, O_LAYOUT, STAGED, WHICH)
        mbarrier.wait(info_full.index(info_slot), info_phase)
        info = info_smem.index(info_slot).load(INFO)
        num_tiles = _field(info, fields, 0)
    tma.store_wait(0)


@gluon.jit
def _flash_prefill_kernel(
    q_desc, kv_desc, out_desc, out_ptr, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr, counter_ptr,
    num_items, num_seqs, num_heads, section, group, num_kv_heads, num_pages, stride_table, scale_log2,
    D: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr,
    CAUSAL: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, D], tile_layout)
    v_smem = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, D], tile_layout)
    out_smem = gl.allocate_shared_memory(dtype, [2, 64, D] if STAGED else [2, 8, 64], out_desc.layout)
    info_smem = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    info_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    info_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(info_full.index(i), count=1)
        mbarrier.init(info_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_produce, (
            q_desc, kv_desc, block_table_ptr, cu_seqlens_q_ptr, kv_lens_ptr, counter_ptr,
            num_items, num_seqs, num_heads, section, group, num_kv_heads, num_pages, stride_table,
            q_smem, k_smem, v_smem, info_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, info_full, info_empty,
            D, BLOCK_N, SLOTS, PAGE, BOX, CAUSAL,
        )),
        (_consume, (
            out_desc, out_ptr, num_heads, scale_log2,
            q_smem, k_smem, v_smem, out_smem, info_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, info_full, info_empty,
            D, BLOCK_N, SLOTS, CAUSAL, STAGED, 0,
        )),
        (_consume, (
            out_desc, out_ptr, num_heads, scale_log2,
            q_smem, k_smem, v_smem, out_smem, info_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, info_full, info_empty,
            D, BLOCK_N, SLOTS, CAUSAL, STAGED, 1,
        )),
    ], [4, 4], [240, 240])  # fmt: skip


@lru_cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)  # pyright: ignore[reportReturnType] - a constexpr function


def _descriptor(tensor: torch.Tensor, rows: int, width: int, row_stride: int, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, [rows, width], [row_stride, 1], box, _layout(*box, tensor.dtype))


def _fits(q: torch.Tensor, kv_pages: torch.Tensor, max_seqlen_q: int, special: bool) -> bool:
    """Whether this kernel takes the call: 16-byte rows for the tensor copies, and enough queries to fill the tiles."""
    head_dim, page_size = q.shape[2], kv_pages.shape[3]
    return (
        not special
        and q.dtype in (torch.bfloat16, torch.float16)
        and kv_pages.dtype in (q.dtype, torch.float8_e4m3fn)
        and head_dim in (64, 128, 256, 512, 1024)
        and (page_size % 64 == 0 or page_size in (16, 32))
        and max_seqlen_q >= 64
        and q.stride(1) == head_dim
        and q.stride(2) == 1
        and q.stride(0) % 8 == 0
        and q.data_ptr() % 16 == 0
        and kv_pages.is_contiguous()
        and kv_pages.data_ptr() % 16 == 0
    )


def _pays(q: torch.Tensor, kv_pages: torch.Tensor, num_seqs: int, max_kv_len: int, usual_num_seqs: int | None) -> bool:
    """Whether this kernel is the faster one: enough items for the SMs, where the portable one would split keys among idle ones, and,
    for fp8, queries enough that its higher rate (about 640 against 400 TFLOP/s) is worth the bytes of widening."""
    num_tokens, num_heads, head_dim = q.shape
    num_items = max(usual_num_seqs or num_seqs, -(-num_tokens // BLOCK_M.value)) * num_heads
    if head_dim <= 256 and num_splits(num_items, max_kv_len, num_sms(q.device)) > 1:
        return False
    if kv_pages.dtype != torch.float8_e4m3fn:
        return True
    rows = num_tokens * (num_heads // kv_pages.shape[2]) // (usual_num_seqs or num_seqs)
    return rows >= WIDENING_ROWS and widened_bytes(kv_pages, num_seqs, max_kv_len) <= WIDENED_BYTES


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
    """As kernels/portable/flash_prefill.py, and one thing more: every value in the pages must be finite, also behind a sequence's last key
    (a cache allocated as zeros is, whatever was written since). Keys there are masked, but 0 · NaN is NaN in the product with V.

    Head dimensions of 512 and 1024 are wide_prefill.py's. Windows, soft caps, block masks, LSE, other head dimensions, batches of short
    chunks, and few queries over many keys go to the portable kernel. fp8 pages are widened to 16 bits first, or go there, too.
    """
    special = sliding_window > 0 or logit_soft_cap > 0 or block_mask is not None or return_lse
    if not _fits(q, kv_pages, max_seqlen_q, special) or not _pays(q, kv_pages, kv_lens.shape[0], max_kv_len, usual_num_seqs):
        return portable_flash_prefill(
            q, kv_pages, block_table, cu_seqlens_q, kv_lens, max_seqlen_q=max_seqlen_q, max_kv_len=max_kv_len, scale=scale,
            sliding_window=sliding_window, logit_soft_cap=logit_soft_cap, causal=causal, kv_scales=kv_scales, block_mask=block_mask,
            return_lse=return_lse, usual_num_seqs=usual_num_seqs,
        )  # fmt: skip
    if kv_pages.dtype != q.dtype:
        kv_pages, block_table = widened_pages(kv_pages, block_table, kv_lens, kv_scales, max_kv_len, q.dtype)
    num_tokens, num_heads, head_dim = q.shape
    if head_dim > 256:
        return wide_prefill(
            q, kv_pages, block_table, cu_seqlens_q, kv_lens, max_seqlen_q=max_seqlen_q, max_kv_len=max_kv_len, scale=scale, causal=causal
        )
    _, num_pages, num_kv_heads, page_size, _ = kv_pages.shape
    num_seqs, group = kv_lens.shape[0], num_heads // num_kv_heads
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    block_n, box = (64, 64) if head_dim == 256 else (128, 64)
    box = min(box, page_size)
    width = num_heads * head_dim
    num_items = (num_tokens // BLOCK_M.value + num_seqs) * num_heads
    section = min(num_heads, group * max(1, L2_BYTES // (max_kv_len * head_dim * 4)))
    _flash_prefill_kernel[(min(num_sms(q.device), num_items),)](
        _descriptor(q, num_tokens, width, q.stride(0), [64, head_dim]),
        _descriptor(kv_pages, 2 * num_pages * num_kv_heads * page_size, head_dim, head_dim, [box, head_dim]),
        _descriptor(out, num_tokens, width, width, [64, head_dim]),
        out, block_table, cu_seqlens_q, kv_lens, zeroed_counters(q.device, 1),
        num_items, num_seqs, num_heads, section, group, num_kv_heads, num_pages, block_table.stride(0), scale * LOG2_E,
        D=head_dim, BLOCK_N=block_n, SLOTS=4 if head_dim == 64 else 2, PAGE=page_size, BOX=box, CAUSAL=causal,
        STAGED=head_dim < 256, num_warps=4,
    )  # fmt: skip
    return out
