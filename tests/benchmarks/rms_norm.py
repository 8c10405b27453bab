"""RMSNorm with the residual fused in, beside torch's add and rms_norm. GB/s count two reads and two writes of the rows.

python tests/benchmarks/rms_norm.py [--out FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import measure
import torch

from halfmoon.kernels.portable.rms_norm import rms_norm

HIDDEN = 4096


def in_torch(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return torch.rms_norm(total, (HIDDEN,), weight, 1e-5), total


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", help="JSON file to write")
    args = options.parse_args()
    rows: list[dict[str, Any]] = []
    weight = torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16)
    for num_tokens in (32, 256, 16384):
        x, residual = (torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, _ = rms_norm(x, weight, 1e-5, residual)
        reference = torch.rms_norm(x.float() + residual.float(), (HIDDEN,), weight.float(), 1e-5)
        error = measure.relative_error(out, reference)
        graphs = {
            "portable": measure.captured(partial(rms_norm, x, weight, 1e-5, residual)),
            "torch": measure.captured(partial(in_torch, x, weight, residual)),
        }
        times = measure.interleaved(graphs)
        num_bytes = 4.0 * num_tokens * HIDDEN * 2
        rows.append(measure.moved(f"rms_norm {num_tokens} x {HIDDEN}", num_bytes, times, error=error))
    measure.write(args.out, rows)


if __name__ == "__main__":
    main()
