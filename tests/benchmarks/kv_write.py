"""QK-norm, RoPE and the write into pages in one pass, beside the plain torch reference. GB/s count q, k and v read and written once.

python tests/benchmarks/kv_write.py [--out FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import measure
import torch

from halfmoon.kernels.portable.kv_write import kv_write
from halfmoon.kernels.reference.kv_write import kv_write as in_torch

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", help="JSON file to write")
    args = options.parse_args()
    rows: list[dict[str, Any]] = []
    angle = torch.arange(8192, device="cuda")[:, None] * 10000.0 ** (-torch.arange(HEAD_DIM // 2, device="cuda") / (HEAD_DIM // 2))
    cos_sin = torch.cat((angle.cos(), angle.sin()), 1).float()
    norm = torch.randn(HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    for num_tokens in (32, 256, 8192):
        fused = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        positions, slots = torch.arange(num_tokens, device="cuda"), torch.randperm(8192, device="cuda")[:num_tokens]
        pages = [torch.zeros(2, 8192 // PAGE, KV_HEADS, PAGE, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        calls = {
            name: partial(call, q, k, v, positions, cos_sin, slots, to, q_norm=norm, k_norm=norm)
            for (name, call), to in zip((("portable", kv_write), ("torch", in_torch)), pages, strict=True)
        }
        error = max(measure.relative_error(calls["portable"](), calls["torch"]()), measure.relative_error(*pages))
        times = measure.interleaved({name: measure.captured(call) for name, call in calls.items()})
        num_bytes = 2.0 * fused.numel() * 2
        rows.append(measure.moved(f"kv_write {num_tokens} tokens", num_bytes, times, difference=error))
    measure.write(args.out, rows)


if __name__ == "__main__":
    main()
