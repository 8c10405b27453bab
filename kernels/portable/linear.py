"""A single token's linear layer: each program takes a few rows of the weights and streams them once; everything else goes to cuBLAS.

weight [out, in], ROWS rows a program ─► products with x, summed in fp32 a lane ─► sum over lanes ─► out
gated: a program takes the same rows of both halves, gate and up ─► silu(gate) · up

From Hopper on a program starts while the kernel before it still ends (programmatic dependent launch): the first weights are on their way
by the time that x is there.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import early_launch

ROWS = 4
BLOCK_IN = 1024


@triton.jit
def _dot(
    weight_ptr, x_ptr, rows, stride, first, num_out, NUM_IN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """Sums of the rows' products with x; first: the first block of the rows, loaded before."""
    columns = tl.arange(0, BLOCK)
    at = weight_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    x = tl.load(x_ptr + columns, mask=columns < NUM_IN, other=0.0).to(tl.float32)
    acc = first.to(tl.float32) * x[None, :]
    for start in tl.range(BLOCK, NUM_IN, BLOCK, loop_unroll_factor=3):
        if EVEN:
            weights = tl.load(at + start, cache_modifier=".cg")
            x = tl.load(x_ptr + start + columns).to(tl.float32)
        else:
            inside = start + columns < NUM_IN
            weights = tl.load(at + start, mask=(rows < num_out)[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        acc += weights.to(tl.float32) * x[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _first(weight_ptr, rows, stride, num_out, NUM_IN: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    at = weight_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if EVEN:
        return tl.load(at, cache_modifier=".cg")
    return tl.load(at, mask=(rows < num_out)[:, None] & (columns < NUM_IN)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_out"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, stride, num_out,
    NUM_IN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    up_ptr = weight_ptr + num_out.to(tl.int64) * stride
    first = _first(weight_ptr, rows, stride, num_out, NUM_IN, BLOCK, EVEN)
    if GATED:
        first_up = _first(up_ptr, rows, stride, num_out, NUM_IN, BLOCK, EVEN)
    if EARLY:
        gdc_wait()
    out = _dot(weight_ptr, x_ptr, rows, stride, first, num_out, NUM_IN, ROWS, BLOCK, EVEN)
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=rows < num_out, other=0.0).to(tl.float32)
    element = out_ptr.dtype.element_ty
    if GATED:
        up = _dot(up_ptr, x_ptr, rows, stride, first_up, num_out, NUM_IN, ROWS, BLOCK, EVEN)
        if HAS_BIAS:
            up += tl.load(bias_ptr + num_out + rows, mask=rows < num_out, other=0.0).to(tl.float32)
        gate = out.to(element).to(tl.float32)  # rounded as the projection's output would be
        out = gate / (1.0 + tl.exp(-gate)) * up.to(element).to(tl.float32)
    tl.store(out_ptr + rows, out.to(element), mask=rows < num_out)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> torch.Tensor:
    """x [num_tokens, in], weight [out, in], bias [out] -> [num_tokens, out] in x's dtype, or [1, out / 2] where gated: for one token alone.

    Sums in fp32. weight's rows are contiguous.
    """
    num_tokens, num_in = x.shape
    if num_tokens != 1 or weight.stride(1) != 1 or x.stride(1) != 1:
        return F.linear(x, weight, bias)
    num_out = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((1, num_out), dtype=x.dtype, device=x.device)
    rows = ROWS // 2 if gated else ROWS
    block = min(BLOCK_IN, triton.next_power_of_2(num_in))
    _linear_kernel[(triton.cdiv(num_out, rows),)](
        x, weight, bias if bias is not None else x, out, weight.stride(0), num_out,
        NUM_IN=num_in, ROWS=rows, BLOCK=block, GATED=gated, HAS_BIAS=bias is not None, EVEN=num_in % block == 0 and num_out % rows == 0,
        num_warps=4, **early_launch(x.device),
    )  # fmt: skip
    return out
