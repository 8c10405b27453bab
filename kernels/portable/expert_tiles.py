"""Pairs of a token and an expert, sorted by expert, and the tiles of rows that a grouped product takes: no size of it depends on the data.

chosen [num_tokens, top_k] ─► pairs [num_pairs]: indices into chosen, those of expert 0 first, each expert's in the tokens' order
tile: up to BLOCK_M of one expert's pairs ─► tiles [3, max_tiles]: its expert, its first place in pairs, its pairs; 0 where there is no tile
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # pairs that a program reads at once


@triton.jit(do_not_specialize=["num_pairs"])
def _expert_count_kernel(chosen_ptr, counts_ptr, num_pairs, BLOCK: tl.constexpr):
    expert, columns = tl.program_id(0), tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        chosen = tl.load(chosen_ptr + start + columns, mask=start + columns < num_pairs, other=-1)
        count += (chosen == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "max_tiles"])
def _expert_place_kernel(
    chosen_ptr, counts_ptr, pairs_ptr, tiles_ptr, num_pairs, max_tiles,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program an expert. EXPERTS: the power of two that NUM_EXPERTS fit in."""
    expert, experts, columns = tl.program_id(0), tl.arange(0, EXPERTS), tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    num_tiles = (counts + BLOCK_M - 1) // BLOCK_M
    count, place = tl.load(counts_ptr + expert), tl.sum(tl.where(experts < expert, counts, 0), axis=0)
    tile = tl.sum(tl.where(experts < expert, num_tiles, 0), axis=0)
    for start in range(0, count, BLOCK_M):
        at = tiles_ptr + tile + start // BLOCK_M
        tl.store(at, expert)
        tl.store(at + max_tiles, place + start)
        tl.store(at + 2 * max_tiles, tl.minimum(count - start, BLOCK_M))
    if expert == NUM_EXPERTS - 1:
        for start in range(tl.sum(num_tiles, axis=0), max_tiles, BLOCK):
            tl.store(tiles_ptr + 2 * max_tiles + start + columns, 0, mask=start + columns < max_tiles)
    if count > 0:
        for start in range(0, num_pairs, BLOCK):
            chosen = tl.load(chosen_ptr + start + columns, mask=start + columns < num_pairs, other=-1)
            own = (chosen == expert).to(tl.int32)
            tl.store(pairs_ptr + place + tl.cumsum(own, axis=0) - 1, start + columns, mask=own > 0)
            place += tl.sum(own, axis=0)


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """As many as num_pairs can fill, however they are spread: an expert that has any may leave a part of its last one empty."""
    hit = min(num_pairs, num_experts)
    return hit + (num_pairs - hit) // block_m


def expert_tiles(chosen: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen int64 [num_tokens, top_k] -> pairs int32 [num_pairs], tiles int32 [3, max_tiles]."""
    num_pairs, most = chosen.numel(), max_tiles(chosen.numel(), num_experts, block_m)
    counts = torch.empty(num_experts, dtype=torch.int32, device=chosen.device)
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty((3, most), dtype=torch.int32, device=chosen.device)
    block = min(BLOCK, max(32, triton.next_power_of_2(num_pairs)))
    _expert_count_kernel[(num_experts,)](chosen, counts, num_pairs, BLOCK=block, num_warps=4)
    _expert_place_kernel[(num_experts,)](
        chosen, counts, pairs, tiles, num_pairs, most,
        NUM_EXPERTS=num_experts, EXPERTS=triton.next_power_of_2(num_experts), BLOCK_M=block_m, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return pairs, tiles
