"""A mixture of experts in two grouped products: a program has a tile of one expert's tokens and some of its columns.

expert_tiles ─► rows of x ─► gate and up of the expert ─► silu(gate) · up ─► middle [num_pairs, width], in the order of pairs
             ─► middle ─► down of the expert ─► times the weight ─► terms [num_tokens, top_k, hidden] ─► sum over a token's experts

Few tokens an expert: small tiles, bound by reading weights, each once. Many: tiles of 128 rows, bound by the matrix units.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .device import shared_bytes
from .expert_tiles import expert_tiles

ASYNC_SHARED = 232448  # bytes of a program from Hopper on, whose matrix units read from shared memory
GROUP = 8  # tiles beside each other that share what they read of the weights in L2


class Tile(NamedTuple):
    block_m: int
    gate_n: int  # columns of gate, and as many of up
    down_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tile_of(num_pairs: int, num_experts: int, element_size: int, shared: int) -> Tile:
    """By the tokens of an expert, where they are spread evenly. shared: bytes that a program may take."""
    each = triton.next_power_of_2(triton.cdiv(num_pairs, num_experts))
    if element_size == 4:
        tile = Tile(min(max(each, 16), 64), 32, 64, 32, 4, 3)
    elif each <= 16:
        tile = Tile(16, 32, 64, 128, 4, 4)
    elif each <= 64:
        tile = Tile(each, 64, 128, 64, 4, 4)
    elif shared >= ASYNC_SHARED:
        tile = Tile(128, 128, 256, 64, 8, 3)
    else:  # sums of the larger tile would not fit in registers beside what the matrix units read from there
        tile = Tile(128, 64, 128, 64, 8, 3)
    bytes_a_stage = (tile.block_m + max(2 * tile.gate_n, tile.down_n)) * tile.block_k * element_size
    return tile._replace(num_stages=max(2, min(tile.num_stages, shared // bytes_a_stage)))


@triton.jit
def _place(max_tiles, num_columns, GROUP: tl.constexpr):
    """Tile and column of this program: GROUP tiles have the same column one after another."""
    program, in_group = tl.program_id(0), GROUP * num_columns
    first = program // in_group * GROUP
    size = tl.minimum(max_tiles - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def _loaded(at, left, EVEN: tl.constexpr, AXIS: tl.constexpr, BLOCK_K: tl.constexpr):
    if EVEN:
        return tl.load(at)
    inside = tl.arange(0, BLOCK_K) < left
    if AXIS == 0:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["max_tiles"])
def _experts_gate_up_kernel(
    x_ptr, weight_ptr, out_ptr, pairs_ptr, tiles_ptr, stride_x, max_tiles,
    TOP_K: tl.constexpr, NUM_IN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = NUM_IN % BLOCK_K == 0
    tile, column = _place(max_tiles, (WIDTH + BLOCK_N - 1) // BLOCK_N, GROUP)
    num_rows = tl.load(tiles_ptr + 2 * max_tiles + tile)
    if num_rows == 0:
        return
    expert, place = tl.load(tiles_ptr + tile).to(tl.int64), tl.load(tiles_ptr + max_tiles + tile)
    rows, columns, k = tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # rows and columns that are not there read others', and are not stored
    tokens = tl.load(pairs_ptr + place + rows, mask=rows < num_rows, other=0) // TOP_K
    x_at = x_ptr + tokens.to(tl.int64)[:, None] * stride_x + k[None, :]
    gate_at = weight_ptr + expert * (2 * WIDTH * NUM_IN) + tl.minimum(columns, WIDTH - 1)[None, :] * NUM_IN + k[:, None]
    up_at = gate_at + WIDTH * NUM_IN
    gate, up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, NUM_IN, BLOCK_K):
        x = _loaded(x_at + start, NUM_IN - start, EVEN, 1, BLOCK_K)
        gate = tl.dot(x, _loaded(gate_at + start, NUM_IN - start, EVEN, 0, BLOCK_K), gate, input_precision="ieee")
        up = tl.dot(x, _loaded(up_at + start, NUM_IN - start, EVEN, 0, BLOCK_K), up, input_precision="ieee")
    element = out_ptr.dtype.element_ty
    gate = gate.to(element).to(tl.float32)  # rounded as the projection's output would be
    out = gate / (1.0 + tl.exp(-gate)) * up.to(element).to(tl.float32)
    out_at = out_ptr + (place + rows).to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(out_at, out.to(element), mask=(rows < num_rows)[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def _experts_down_kernel(
    middle_ptr, weight_ptr, share_ptr, out_ptr, pairs_ptr, tiles_ptr, max_tiles,
    WIDTH: tl.constexpr, NUM_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = WIDTH % BLOCK_K == 0
    tile, column = _place(max_tiles, (NUM_OUT + BLOCK_N - 1) // BLOCK_N, GROUP)
    num_rows = tl.load(tiles_ptr + 2 * max_tiles + tile)
    if num_rows == 0:
        return
    expert, place = tl.load(tiles_ptr + tile).to(tl.int64), tl.load(tiles_ptr + max_tiles + tile)
    rows, columns, k = tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    there = rows < num_rows
    middle_at = middle_ptr + (place + tl.minimum(rows, num_rows - 1)).to(tl.int64)[:, None] * WIDTH + k[None, :]
    weight_at = weight_ptr + expert * (NUM_OUT * WIDTH) + tl.minimum(columns, NUM_OUT - 1)[None, :] * WIDTH + k[:, None]
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        middle = _loaded(middle_at + start, WIDTH - start, EVEN, 1, BLOCK_K)
        out = tl.dot(middle, _loaded(weight_at + start, WIDTH - start, EVEN, 0, BLOCK_K), out, input_precision="ieee")
    pairs = tl.load(pairs_ptr + place + rows, mask=there, other=0)
    out *= tl.load(share_ptr + pairs, mask=there, other=0.0)[:, None]
    out_at = out_ptr + pairs.to(tl.int64)[:, None] * NUM_OUT + columns[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=there[:, None] & (columns < NUM_OUT)[None, :])


def experts(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """See kernels/experts.py. Products sum in fp32; a term is rounded to x's dtype before a token's terms are summed in fp32.

    gate_up, down, weights and chosen are contiguous, and x's rows are. Sizes follow from shapes alone, so a graph can capture it.
    """
    (num_tokens, num_in), (num_experts, _, width), top_k = x.shape, down.shape, chosen.shape[1]
    if num_tokens == 0:
        return torch.empty_like(x)
    tile = tile_of(num_tokens * top_k, num_experts, x.element_size(), shared_bytes(x.device))
    pairs, tiles = expert_tiles(chosen, num_experts, tile.block_m)
    most = tiles.shape[1]
    shape = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "GROUP": GROUP, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    middle = torch.empty((num_tokens * top_k, width), dtype=x.dtype, device=x.device)
    _experts_gate_up_kernel[(most * triton.cdiv(width, tile.gate_n),)](
        x, gate_up, middle, pairs, tiles, x.stride(0), most, TOP_K=top_k, NUM_IN=num_in, WIDTH=width, BLOCK_N=tile.gate_n, **shape
    )
    terms = torch.empty((num_tokens, top_k, num_in), dtype=x.dtype, device=x.device)
    _experts_down_kernel[(most * triton.cdiv(num_in, tile.down_n),)](
        middle, down, weights, terms, pairs, tiles, most, WIDTH=width, NUM_OUT=num_in, BLOCK_N=tile.down_n, **shape
    )
    return terms.sum(dim=1)
