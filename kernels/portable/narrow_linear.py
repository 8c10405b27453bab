"""Products of fp8 or int8 with fp8 or int8: one kernel for a single token, which rounds it on the way, and tiles for several.

one token:  a program takes a few rows ─► the token's largest number ─► bytes of the rows times the rounded token, summed in fp32
several:    narrow_tokens ─► tiles of BLOCK_M tokens and BLOCK_N rows: dot over BLOCK_K columns ─► scales ─► out
            or torch's own product (cuBLAS, CUTLASS) where it takes the form

fp8 numbers meet in the matrix unit from sm_89 on; before, they become fp16 exactly.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import early_launch
from .fp8 import _way, narrowed, widened
from .narrow_tokens import limit_of, narrow_tokens, nearest_int, scale_of

NOT_FP8 = 0
BLOCK = 128
"""Columns that share a scale where there are several groups."""
MIN_INT_MM_TOKENS = 17


@triton.jit
def _rounded(x, scale, FP8: tl.constexpr):
    """The token's numbers in units of scale, as the narrow type has them, in fp32."""
    scaled = tl.div_rn(x, scale + tl.zeros_like(x))
    if FP8 == 0:
        numbers = nearest_int(scaled)
    else:
        numbers = widened(narrowed(scaled), tl.float32, FP8)
    return numbers


@triton.jit
def _numbers(weights, FP8: tl.constexpr):
    if FP8 == 0:
        numbers = weights.to(tl.float32)
    else:
        numbers = widened(weights, tl.float32, FP8)
    return numbers


@triton.jit(do_not_specialize=["num_out"])
def _narrow_token_kernel(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, out_ptr, stride, num_out,
    NUM_IN: tl.constexpr, NUM_GROUPS: tl.constexpr, ROW_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FP8: tl.constexpr, LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at, there = weight_ptr + rows.to(tl.int64)[:, None] * stride, (rows < num_out)[:, None]
    scale_at = scales_ptr + (rows // ROW_BLOCK) * NUM_GROUPS
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    x_scale = 1.0
    if NUM_GROUPS == 1:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, NUM_IN, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=start + columns < NUM_IN, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
        x_scale = scale_of(tl.max(largest, axis=0), LIMIT)
    for start in range(0, NUM_IN, BLOCK):
        inside = start + columns < NUM_IN
        weights = tl.load(at + (start + columns)[None, :], mask=there & inside[None, :], other=0)
        x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        if NUM_GROUPS == 1:
            acc += _numbers(weights, FP8) * _rounded(x, x_scale, FP8)[None, :]
        else:
            x_scale = scale_of(tl.max(tl.abs(x), axis=0), LIMIT)
            scales = tl.load(scale_at + start // BLOCK, mask=rows < num_out, other=0.0) * x_scale
            acc += _numbers(weights, FP8) * _rounded(x, x_scale, FP8)[None, :] * scales[:, None]
    out = tl.sum(acc, axis=1)
    if NUM_GROUPS == 1:
        out *= x_scale * tl.load(scale_at, mask=rows < num_out, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=rows < num_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < num_out)


@triton.jit
def _dot(a, b, acc, FP8: tl.constexpr):
    if FP8 == 0:
        out = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif FP8 == 2:
        out = tl.dot(a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True), acc)
    else:
        out = tl.dot(widened(a, tl.float16, FP8), widened(b, tl.float16, FP8), acc)
    return out


@triton.jit(do_not_specialize=["num_tokens", "num_out"])
def _narrow_tile_kernel(
    x_ptr, x_scales_ptr, weight_ptr, scales_ptr, bias_ptr, out_ptr, stride, num_tokens, num_out,
    NUM_IN: tl.constexpr, NUM_GROUPS: tl.constexpr, ROW_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FP8: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tokens, rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    is_token, is_row = tokens < num_tokens, rows < num_out
    x_at = x_ptr + tokens.to(tl.int64)[:, None] * NUM_IN + columns[None, :]
    at = weight_ptr + rows.to(tl.int64)[None, :] * stride + columns[:, None]
    x_scale_at, scale_at = x_scales_ptr + tokens * NUM_GROUPS, scales_ptr + (rows // ROW_BLOCK) * NUM_GROUPS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FP8 == 0:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, NUM_IN, BLOCK_K):
        inside = start + columns < NUM_IN
        a = tl.load(x_at + start, mask=is_token[:, None] & inside[None, :], other=0)
        b = tl.load(at + start, mask=is_row[None, :] & inside[:, None], other=0)
        if NUM_GROUPS == 1:
            acc = _dot(a, b, acc, FP8)
        else:
            x_scales = tl.load(x_scale_at + start // BLOCK_K, mask=is_token, other=0.0)
            scales = tl.load(scale_at + start // BLOCK_K, mask=is_row, other=0.0)
            part = _dot(a, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), FP8)
            acc += part * x_scales[:, None] * scales[None, :]
    out = acc.to(tl.float32)
    if NUM_GROUPS == 1:
        out *= tl.load(x_scale_at, mask=is_token, other=0.0)[:, None] * tl.load(scale_at, mask=is_row, other=0.0)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + tokens.to(tl.int64)[:, None] * num_out + rows[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


def narrow_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    row_block: int,
    group_len: int,
    way: str = "",
) -> torch.Tensor:
    """See kernels/narrow_linear.py. way: one of ways(); empty: the first. Raises ValueError for groups of another length than BLOCK."""
    if scales.shape[1] > 1 and group_len != BLOCK:
        raise ValueError(f"columns of a block are {group_len}; the kernels know {BLOCK}")
    way = way or ways(x, weight, scales)[0]
    if way == "token":
        return _token(x, weight, scales, bias, row_block)
    tokens, token_scales = narrow_tokens(x, weight.dtype, BLOCK if scales.shape[1] > 1 else x.shape[1])
    if way == "torch":
        return _in_torch(tokens, token_scales, weight, scales, bias, x.dtype)
    return _tiles(tokens, token_scales, weight, scales, bias, row_block, x.dtype)


def ways(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> list[str]:
    """How the product can be had, the likeliest first: token, tiles, torch."""
    found = ["tiles"]
    sixteens = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0 and scales.shape[1] == 1
    if weight.dtype == torch.int8:
        takes = x.is_cuda and sixteens and len(x) >= MIN_INT_MM_TOKENS
    else:  # scales a row are CUTLASS's, which gives bf16
        takes = x.is_cuda and sixteens and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 9)
    if takes:
        found.insert(0 if len(x) > 64 else 1, "torch")
    return ["token", *found] if len(x) == 1 else found


def _in_torch(
    tokens: torch.Tensor,
    token_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if weight.dtype == torch.int8:
        out = torch._int_mm(tokens, weight.t()) * token_scales * scales.t()
        return (out if bias is None else out + bias).to(dtype)
    # without fast accumulation, which keeps 14 bits of the sums on Hopper
    return torch._scaled_mm(tokens, weight.t(), token_scales, scales.t(), bias=bias, out_dtype=dtype, use_fast_accum=False)


def _token(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, row_block: int) -> torch.Tensor:
    num_out, num_in = weight.shape
    out = torch.empty((1, num_out), dtype=x.dtype, device=x.device)
    blocked, numbers, fp8 = scales.shape[1] > 1, *_readable(weight)
    rows = 16 if blocked else 4
    _narrow_token_kernel[(triton.cdiv(num_out, rows),)](
        x, numbers, scales, bias if bias is not None else x, out, weight.stride(0), num_out,
        NUM_IN=num_in, NUM_GROUPS=scales.shape[1], ROW_BLOCK=row_block, ROWS=rows,
        BLOCK=BLOCK if blocked else min(1024, triton.next_power_of_2(num_in)), FP8=fp8, LIMIT=limit_of(weight.dtype),
        HAS_BIAS=bias is not None, num_warps=4, **early_launch(x.device),
    )  # fmt: skip
    return out


def _tiles(
    tokens: torch.Tensor,
    token_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    row_block: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_tokens, (num_out, num_in) = len(tokens), weight.shape
    out = torch.empty((num_tokens, num_out), dtype=dtype, device=tokens.device)
    numbers, fp8 = _readable(weight)
    block_m = min(128, max(16, triton.next_power_of_2(num_tokens)))
    block_n = 128 if block_m == 128 else 64
    if num_tokens:
        _narrow_tile_kernel[(triton.cdiv(num_tokens, block_m), triton.cdiv(num_out, block_n))](
            _readable(tokens)[0], token_scales, numbers, scales, bias if bias is not None else out, out,
            weight.stride(0), num_tokens, num_out,
            NUM_IN=num_in, NUM_GROUPS=scales.shape[1], ROW_BLOCK=row_block, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK, FP8=fp8,
            HAS_BIAS=bias is not None, num_warps=8 if block_m == 128 else 4, num_stages=3,
        )  # fmt: skip
    return out


def _readable(numbers: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (numbers, NOT_FP8) if numbers.dtype == torch.int8 else (numbers.view(torch.uint8), _way(numbers.device))
