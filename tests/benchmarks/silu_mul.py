"""SwiGLU's middle beside torch's silu and product. GB/s count gate, up and the result once each.

python tests/benchmarks/silu_mul.py [--out FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import measure
import torch
import torch.nn.functional as F

from halfmoon.kernels.portable.silu_mul import silu_mul

INTERMEDIATE = 14336


def in_torch(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", help="JSON file to write")
    args = options.parse_args()
    rows: list[dict[str, Any]] = []
    for num_tokens in (32, 256, 8192):
        gate_up = torch.randn(num_tokens, 2 * INTERMEDIATE, device="cuda", dtype=torch.bfloat16)
        error = measure.relative_error(silu_mul(gate_up), in_torch(gate_up.float()))
        graphs = {name: measure.captured(partial(call, gate_up)) for name, call in (("portable", silu_mul), ("torch", in_torch))}
        times = measure.interleaved(graphs)
        num_bytes = 3.0 * num_tokens * INTERMEDIATE * 2
        rows.append(measure.moved(f"silu_mul {num_tokens} x {INTERMEDIATE}", num_bytes, times, error=error))
    measure.write(args.out, rows)


if __name__ == "__main__":
    main()
