"""QK-norm, RoPE and the write into pages in one pass, beside the plain torch reference. GB/s count q, k and v read and written once.

halfmoon bench kv_write [--quick] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import measure
import torch
from flash_prefill import E4M3
from measure import Case, Row

from halfmoon.kernels.portable.kv_write import kv_write
from halfmoon.kernels.reference.kv_write import kv_write as in_torch

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64


def write(num_tokens: int, stored: torch.dtype, case: str) -> Row:
    angle = torch.arange(8192, device="cuda")[:, None] * 10000.0 ** (-torch.arange(HEAD_DIM // 2, device="cuda") / (HEAD_DIM // 2))
    cos_sin = torch.cat((angle.cos(), angle.sin()), 1).float()
    norm = torch.randn(HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    fused = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    positions, slots = torch.arange(num_tokens, device="cuda"), torch.randperm(8192, device="cuda")[:num_tokens]
    pages = [torch.zeros(2, 8192 // PAGE, KV_HEADS, PAGE, HEAD_DIM, device="cuda").to(stored) for _ in range(2)]
    calls = {
        name: partial(call, q, k, v, positions, cos_sin, slots, to, q_norm=norm, k_norm=norm)
        for (name, call), to in zip((("portable", kv_write), ("torch", in_torch)), pages, strict=True)
    }
    difference = max(measure.relative_error(calls["portable"](), calls["torch"]()), measure.relative_error(*pages))
    limit = 5e-3 if stored != E4M3 else 2e-2  # a number on the edge between two may fall on either side
    num_bytes = 2.0 * q.nbytes + (k.nbytes + v.nbytes) * (1 + stored.itemsize / 2)
    times = measure.interleaved({name: measure.captured(call) for name, call in calls.items()})
    return measure.timed(
        "kv_write", case, 8.0 * fused.numel(), num_bytes, times, compute=False, difference=difference, ok=difference <= limit
    )


def cases(quick: bool) -> list[Case]:
    found = [
        (f"{n} tokens, {kind}", n, of)
        for n in ((256, 8192) if quick else (32, 256, 8192))
        for kind, of in (("bf16", torch.bfloat16), ("fp8", E4M3))
    ]
    return [Case("kv_write", name, partial(write, n, of, name)) for name, n, of in found]


if __name__ == "__main__":
    measure.main(__doc__, cases)
