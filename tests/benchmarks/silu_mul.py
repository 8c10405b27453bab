"""SwiGLU's middle beside torch's silu and product and vLLM's operator. GB/s count gate, up and the result once each.

halfmoon bench silu_mul [--quick] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import measure
import torch
import torch.nn.functional as F
from measure import Calls, Case, Row

from halfmoon.kernels.portable.silu_mul import silu_mul

INTERMEDIATE = 14336


def in_torch(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def activation(num_tokens: int, case: str) -> Row:
    gate_up = torch.randn(num_tokens, 2 * INTERMEDIATE, device="cuda", dtype=torch.bfloat16)
    out = silu_mul(gate_up)
    error = measure.relative_error(out, in_torch(gate_up.float()))
    calls: Calls = {"portable": partial(silu_mul, gate_up), "torch": partial(in_torch, gate_up)}
    vllm = measure.load_vllm()
    if vllm is not None:
        calls |= measure.present({"vllm": lambda: vllm.silu_and_mul(torch.empty_like(out), gate_up)})
    times = measure.interleaved({name: measure.captured(call) for name, call in calls.items()})
    return measure.timed("silu_mul", case, 5.0 * out.numel(), 3.0 * out.nbytes, times, compute=False, error=error, ok=error < 6e-3)


def cases(quick: bool) -> list[Case]:
    sizes = (32, 8192) if quick else (32, 256, 8192)
    return [Case("silu_mul", f"{n} x {INTERMEDIATE}", partial(activation, n, f"{n} x {INTERMEDIATE}")) for n in sizes]


if __name__ == "__main__":
    measure.main(__doc__, cases)
