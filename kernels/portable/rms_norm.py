"""RMSNorm of rows, with the residual addition fused in. One program a row; the row stays in registers, so it is read once.

residual ─┐
x ────────┴─► sum ─► new_residual
               └───► sum · rsqrt(mean(sum²) + eps) · weight ─► out
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


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, new_residual_ptr, stride_x, stride_residual, hidden, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * stride_residual + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + row * hidden + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)  # the norm sees what the next layer will add to
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    tl.store(out_ptr + row * hidden + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., hidden] (any float dtype, last dimension contiguous), weight [hidden] -> out [..., hidden] in x's dtype;
    with a residual also the new one, x + residual rounded to x's dtype. Arithmetic in fp32.

    Raises ValueError for a hidden size above 65,536 (the row must fit in registers).
    """
    hidden = x.shape[-1]
    if hidden > 65536:
        raise ValueError(f"rms_norm holds a row in registers: hidden size {hidden} is above 65536; split the row")
    rows = x.reshape(-1, hidden)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    addend = residual.reshape(-1, hidden) if residual is not None else rows
    new_residual = torch.empty_like(out) if residual is not None else out
    block = triton.next_power_of_2(hidden)
    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, weight, addend, out, new_residual, rows.stride(0), addend.stride(0), hidden, eps,
            HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
            **early_launch(x.device),
        )  # fmt: skip
    if residual is None:
        return out.view(x.shape)
    return out.view(x.shape), new_residual.view(x.shape)
