"""SwiGLU's middle: out = silu(gate) · up, both halves of one projection's output. Bound by memory: each value is touched once.

gate_up [n, 2·i] = gate [n, i] | up [n, i]  ──►  out [n, i]
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
def _silu_mul_kernel(gate_up_ptr, out_ptr, stride_gate_up, intermediate, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < intermediate
    gate = tl.load(gate_up_ptr + row * stride_gate_up + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_gate_up + intermediate + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * intermediate + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2·i] (any float dtype, last dimension contiguous) -> [..., i] in the same dtype. Arithmetic in fp32.

    Raises ValueError for an odd last dimension.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"silu_mul wants gate and up side by side: the last dimension {gate_up.shape[-1]} is odd")
    intermediate = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * intermediate)
    out = torch.empty((rows.shape[0], intermediate), dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(intermediate))
    if rows.shape[0]:
        _silu_mul_kernel[(rows.shape[0], triton.cdiv(intermediate, block))](
            rows, out, rows.stride(0), intermediate, BLOCK=block, num_warps=4, **early_launch(rows.device)
        )
    return out.view(*gate_up.shape[:-1], intermediate)
