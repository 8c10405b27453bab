"""Products with int4 weights: dequantised in registers for few tokens, and into memory, for cuBLAS, for many.

one token:  a program takes a few rows; a word's eight numbers meet every eighth input, plane by plane ─► sums in fp32
few:        tiles of BLOCK_M tokens and BLOCK_N rows: words ─► numbers - zeros, exact in 16 bits ─► dot ─► times the group's scales
many:       every weight is written once in x's numbers ─► cuBLAS
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import early_launch

MIN_DOT_COLUMNS = 16
MANY_TOKENS = 256
"""From which on cuBLAS is tried first."""


@triton.jit
def _zeros(zeros_ptr, at, mask, HAS_ZEROS: tl.constexpr):
    if HAS_ZEROS:
        zeros = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)
    else:
        zeros = tl.full(at.shape, 8.0, tl.float32)
    return zeros


@triton.jit(do_not_specialize=["num_out"])
def _int4_token_kernel(
    x_ptr, weight_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, stride, num_out,
    NUM_WORDS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    rows, words = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = weight_ptr + rows.to(tl.int64)[:, None] * stride
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, NUM_WORDS, BLOCK):
        here = start + words
        there = (rows < num_out)[:, None] & (here < NUM_WORDS)[None, :]
        packed = tl.load(at + here[None, :], mask=there, other=0)
        group = rows[:, None] * NUM_GROUPS + (here // GROUP_WORDS)[None, :]
        scales = tl.load(scales_ptr + group, mask=there, other=0.0).to(tl.float32)
        zeros = _zeros(zeros_ptr, group, there, HAS_ZEROS)
        part = tl.zeros((ROWS, BLOCK), tl.float32)
        for plane in tl.static_range(8):
            x = tl.load(x_ptr + here * 8 + plane, mask=here < NUM_WORDS, other=0.0).to(tl.float32)
            part += (((packed >> (4 * plane)) & 15).to(tl.float32) - zeros) * x[None, :]
        acc += part * scales
    out = tl.sum(acc, axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=rows < num_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < num_out)


@triton.jit(do_not_specialize=["num_tokens", "num_out"])
def _int4_tile_kernel(
    x_ptr, weight_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, x_stride, stride, num_tokens, num_out,
    NUM_IN: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_LEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_K divides GROUP_LEN: a block of columns has one scale a row."""
    tokens, rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    is_token, is_row = tokens < num_tokens, rows < num_out
    x_at = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + columns[None, :]
    at = weight_ptr + rows.to(tl.int64)[None, :] * stride + (columns // 8)[:, None]
    shifts = ((columns % 8) * 4)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, NUM_IN, BLOCK_K):
        x = tl.load(x_at + start, mask=is_token[:, None], other=0.0)
        packed = tl.load(at + start // 8, mask=is_row[None, :], other=0)  # eight lanes read one word
        group = rows * NUM_GROUPS + start // GROUP_LEN
        zeros = _zeros(zeros_ptr, group, is_row, HAS_ZEROS)
        numbers = (((packed >> shifts) & 15).to(tl.float32) - zeros[None, :]).to(x.dtype)
        scales = tl.load(scales_ptr + group, mask=is_row, other=0.0).to(tl.float32)
        acc += tl.dot(x, numbers, input_precision="ieee") * scales[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + tokens.to(tl.int64)[:, None] * num_out + rows[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


@triton.jit
def _dequantize_kernel(
    weight_ptr, scales_ptr, zeros_ptr, out_ptr, stride, num_in,
    NUM_GROUPS: tl.constexpr, GROUP_LEN: tl.constexpr, BLOCK: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_in
    packed = tl.load(weight_ptr + row * stride + columns // 8, mask=inside, other=0)
    group = row * NUM_GROUPS + columns // GROUP_LEN
    zeros = _zeros(zeros_ptr, group, inside, HAS_ZEROS)
    scales = tl.load(scales_ptr + group, mask=inside, other=0.0).to(tl.float32)
    numbers = (((packed >> ((columns % 8) * 4)) & 15).to(tl.float32) - zeros) * scales
    tl.store(out_ptr + row * num_in + columns, numbers.to(out_ptr.dtype.element_ty), mask=inside)


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_len: int,
    way: str = "",
) -> torch.Tensor:
    """See kernels/int4_linear.py. way: one of ways(); empty: the first."""
    way = way or ways(x, weight, group_len)[0]
    if way == "dequantized":
        return F.linear(x, dequantized(weight, scales, zeros, group_len, x.dtype), bias)
    num_tokens, num_out, num_in = len(x), len(weight), x.shape[1]
    out = torch.empty((num_tokens, num_out), dtype=x.dtype, device=x.device)
    zeros_or, bias_or = zeros if zeros is not None else scales, bias if bias is not None else x
    given = {"NUM_GROUPS": scales.shape[1], "HAS_ZEROS": zeros is not None, "HAS_BIAS": bias is not None}
    if way == "token":
        _int4_token_kernel[(triton.cdiv(num_out, 4),)](
            x, weight, scales, zeros_or, bias_or, out, weight.stride(0), num_out,
            NUM_WORDS=num_in // 8, GROUP_WORDS=group_len // 8, ROWS=4, BLOCK=min(256, triton.next_power_of_2(num_in // 8)), num_warps=4,
            **given, **early_launch(x.device),
        )  # fmt: skip
    elif num_tokens:
        block_m = min(64, max(16, triton.next_power_of_2(num_tokens)))
        block_n = 32 if block_m == 16 else 64
        _int4_tile_kernel[(triton.cdiv(num_tokens, block_m), triton.cdiv(num_out, block_n))](
            x, weight, scales, zeros_or, bias_or, out, x.stride(0), weight.stride(0), num_tokens, num_out,
            NUM_IN=num_in, GROUP_LEN=group_len, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_block_k(group_len),
            num_warps=4, num_stages=4, **given,
        )  # fmt: skip
    return out


def ways(x: torch.Tensor, weight: torch.Tensor, group_len: int) -> list[str]:
    """How the product can be had, the likeliest first: token, tiles, dequantized."""
    if _block_k(group_len) < MIN_DOT_COLUMNS:
        found = ["dequantized"]
    else:
        found = ["tiles", "dequantized"] if len(x) < MANY_TOKENS else ["dequantized", "tiles"]
    return ["token", *found] if len(x) == 1 else found


def dequantized(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_len: int, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] of dtype."""
    num_out, num_in = len(weight), weight.shape[1] * 8
    out = torch.empty((num_out, num_in), dtype=dtype, device=weight.device)
    block = min(1024, triton.next_power_of_2(num_in))
    _dequantize_kernel[(num_out, triton.cdiv(num_in, block))](
        weight, scales, zeros if zeros is not None else scales, out, weight.stride(0), num_in,
        NUM_GROUPS=scales.shape[1], GROUP_LEN=group_len, BLOCK=block, HAS_ZEROS=zeros is not None, num_warps=4,
    )  # fmt: skip
    return out


def _block_k(group_len: int) -> int:
    """Columns of a tile: a power of two that divides the group."""
    return min(64, group_len & -group_len)
