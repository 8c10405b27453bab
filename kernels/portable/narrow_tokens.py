"""Tokens as fp8 or int8 with their scales: the largest number of a token, or of each of its groups, becomes the type's largest.

x [num_tokens, in] ─► a program a token and group ─► numbers [num_tokens, in], scales fp32 [num_tokens, groups]
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import early_launch
from .fp8 import narrowed


@triton.jit
def scale_of(largest, LIMIT: tl.constexpr):
    return tl.div_rn(tl.maximum(largest, 1.1754943508222875e-38 * LIMIT), LIMIT)


@triton.jit
def nearest_int(x):
    """fp32, at most 127 on each side of 0."""
    return tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, -127.0), 127.0)


@triton.jit
def _narrow_kernel(
    x_ptr, out_ptr, scales_ptr, stride, num_in, num_groups,
    GROUP_LEN: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr, LIMIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = group * GROUP_LEN
    end = tl.minimum(first + GROUP_LEN, num_in)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, GROUP_LEN, BLOCK):
        columns = first + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * stride + columns, mask=columns < end, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = scale_of(tl.max(largest, axis=0), LIMIT)
    tl.store(scales_ptr + token * num_groups + group, scale)
    for start in range(0, GROUP_LEN, BLOCK):
        columns = first + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * stride + columns, mask=columns < end, other=0.0).to(tl.float32)
        scaled = tl.div_rn(x, scale + tl.zeros_like(x))
        if INT8:
            numbers = nearest_int(scaled).to(tl.int8)
        else:
            numbers = narrowed(scaled)
        tl.store(out_ptr + token * num_in + columns, numbers, mask=columns < end)


def limit_of(dtype: torch.dtype) -> float:
    """The largest number of the type."""
    return 127.0 if dtype == torch.int8 else 448.0


def narrow_tokens(x: torch.Tensor, dtype: torch.dtype, group_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference/quantized.py's quantized_tokens. x's rows are contiguous."""
    num_tokens, num_in = x.shape
    num_groups = max(1, triton.cdiv(num_in, group_len))
    out = torch.empty((num_tokens, num_in), dtype=dtype, device=x.device)
    scales = torch.empty((num_tokens, num_groups), dtype=torch.float32, device=x.device)
    if num_tokens:
        length = min(group_len, num_in)
        _narrow_kernel[(num_tokens, num_groups)](
            x, out.view(torch.uint8) if dtype != torch.int8 else out, scales, x.stride(0), num_in, num_groups,
            GROUP_LEN=length, BLOCK=min(1024, triton.next_power_of_2(length)), INT8=dtype == torch.int8,
            LIMIT=limit_of(dtype), num_warps=4,
            **early_launch(x.device),
        )  # fmt: skip
    return out, scales
