"""RMSNorm with the residual fused in, beside torch's add and rms_norm and vLLM's operator. GB/s count two reads and two writes of the rows.

halfmoon bench rms_norm [--quick] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import measure
import torch
from measure import Calls, Case, Row

from halfmoon.kernels.portable.rms_norm import rms_norm

HIDDEN = 4096


def in_torch(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return torch.rms_norm(total, (HIDDEN,), weight, 1e-5), total


def norm(num_tokens: int, case: str) -> Row:
    weight = torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16)
    x, residual = (torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, _ = rms_norm(x, weight, 1e-5, residual)
    reference = torch.rms_norm(x.float() + residual.float(), (HIDDEN,), weight.float(), 1e-5)
    error = measure.relative_error(out, reference)
    calls: Calls = {"portable": partial(rms_norm, x, weight, 1e-5, residual), "torch": partial(in_torch, x, weight, residual)}
    vllm = measure.load_vllm()
    if vllm is not None:  # it works in place, so on rows of its own
        calls |= measure.present({"vllm": partial(vllm.fused_add_rms_norm, x.clone(), residual.clone(), weight, 1e-5)})
    times = measure.interleaved({name: measure.captured(call) for name, call in calls.items()})
    return measure.timed("rms_norm", case, 5.0 * x.numel(), 4.0 * x.nbytes, times, compute=False, error=error, ok=error < 6e-3)


def cases(quick: bool) -> list[Case]:
    return [Case("rms_norm", f"{n} x {HIDDEN}", partial(norm, n, f"{n} x {HIDDEN}")) for n in ((32, 16384) if quick else (32, 256, 16384))]


if __name__ == "__main__":
    measure.main(__doc__, cases)
