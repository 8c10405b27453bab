"""What matrix products on Hopper are made of, with a producer and two consumer warpgroups: barriers, items, the product, a tile's way out.

producer ─► full ─► slots of A [128, 64] and B ─► empty ─► producer          a ring; each consumer takes 64 rows of A and all of B
producer ─► info_full ─► six numbers of an item ─► info_empty ─► producer    a ring of two
consumer ─► staging tiles [64, 64] ─► tensor copies to memory
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

BLOCK_M = gl.constexpr(128)  # rows of a program, of both consumers
STEP = gl.constexpr(64)  # of what a product runs over, a slot


@gluon.jit
def barriers(SLOTS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    info_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    info_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(info_full.index(i), count=1)
        mbarrier.init(info_empty.index(i), count=2)
    fence_async_shared()
    return full, empty, info_full, info_empty


@gluon.jit
def publish(info_smem, info_full, slot, first, second, third, fourth, fifth, sixth):
    """Six numbers of an item to the consumers; the first is 0 where there is no more."""
    INFO: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    fields = gl.arange(0, 8, INFO)
    info = gl.where(fields == 0, first, 0) + gl.where(fields == 1, second, 0) + gl.where(fields == 2, third, 0)
    info += gl.where(fields == 3, fourth, 0) + gl.where(fields == 4, fifth, 0) + gl.where(fields == 5, sixth, 0)
    info_smem.index(slot).store(info)
    mbarrier.arrive(info_full.index(slot), count=1)


@gluon.jit
def field(info, number: gl.constexpr):
    fields = gl.arange(0, 8, gl.BlockedLayout([8], [32], [4], [0]))
    return gl.sum(gl.where(fields == number, info, 0), axis=0)


@gluon.jit
def multiply(
    a_smem, b_smem, full, empty, num_steps, slot, phase,
    N: gl.constexpr, SLOTS: gl.constexpr, WHICH: gl.constexpr, TRANSPOSED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sum of num_steps products of slots, [64, N]; one is always in flight: a slot is handed back when the next product is issued.
    TRANSPOSED: B lies as [N, 64], else as [64, N].
    """
    mbarrier.wait(full.index(slot), phase)
    b = b_smem.index(slot)
    if TRANSPOSED:
        b = b.permute((1, 0))
    acc = gl.zeros([64, N], gl.float32, LAYOUT)
    acc = warpgroup_mma(a_smem.index(slot).slice(WHICH * 64, 64), b, acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    for _ in range(1, num_steps):
        before = slot
        slot += 1
        if slot == SLOTS:
            slot = 0
            phase ^= 1
        mbarrier.wait(full.index(slot), phase)
        b = b_smem.index(slot)
        if TRANSPOSED:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a_smem.index(slot).slice(WHICH * 64, 64), b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(slot), count=1)
    slot += 1
    if slot == SLOTS:
        slot = 0
        phase ^= 1
    return acc, slot, phase


@gluon.jit
def _halves(tile):
    """[64, 2 n] as two [64, n] of neighbouring columns."""
    return gl.split(tile.reshape([64, 2, tile.shape[1] // 2]).permute((0, 2, 1)))


@gluon.jit
def quarter(acc, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """64 columns of [64, 256] or [64, 128]. Registers change their names, no more."""
    if acc.shape[1] == 256:
        left, right = _halves(acc)
        if NUMBER < 2:
            acc = left
        else:
            acc = right
    left, right = _halves(acc)
    if NUMBER % 2 == 0:
        return gl.convert_layout(left, LAYOUT, assert_trivial=True)
    else:
        return gl.convert_layout(right, LAYOUT, assert_trivial=True)


@gluon.jit
def send(tile, desc, out_smem, row, column, NUMBER: gl.constexpr, STAGES: gl.constexpr, WHICH: gl.constexpr):
    """[64, 64] through one of a consumer's STAGES staging tiles, as soon as the copy that used it last has read it.

    NUMBER counts a result's tiles from 0; they are a multiple of STAGES.
    """
    staging = out_smem.index(WHICH * STAGES + NUMBER % STAGES)
    tma.store_wait(STAGES - 1)
    staging.store(tile.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [row, column], staging)
