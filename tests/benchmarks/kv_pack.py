"""Pages of a layer to block slices and back, beside torch's copies by index. GB/s count every byte read and written once.

halfmoon bench kv_pack [--quick] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import measure
import torch
from measure import Case, Row

from halfmoon.kernels.portable.kv_pack import kv_pack, kv_unpack
from halfmoon.kernels.reference import kv_pack as in_torch

KV_HEADS, HEAD_DIM, PAGE, NUM_PAGES = 8, 128, 64, 2048


def move(num_pages: int, case: str) -> Row:
    cache = torch.randn(2, NUM_PAGES, KV_HEADS, PAGE, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    pages = torch.randperm(NUM_PAGES, device="cuda")[:num_pages]
    blocks, other = kv_pack(cache, pages), torch.zeros_like(cache)
    kv_unpack(blocks, other, pages)
    same = torch.equal(blocks, in_torch.kv_pack(cache, pages)) and torch.equal(other[:, pages], cache[:, pages])
    calls = {
        "portable pack": partial(kv_pack, cache, pages),
        "torch pack": partial(in_torch.kv_pack, cache, pages),
        "portable unpack": partial(kv_unpack, blocks, cache, pages),
        "torch unpack": partial(in_torch.kv_unpack, blocks, cache, pages),
    }
    times = measure.interleaved({name: measure.captured(call) for name, call in calls.items()})
    return measure.timed("kv_pack", case, 0.0, 2.0 * blocks.nbytes, times, compute=False, ok=same)


def cases(quick: bool) -> list[Case]:
    return [Case("kv_pack", f"{n} pages of 64", partial(move, n, f"{n} pages of 64")) for n in ((128,) if quick else (8, 128, 1024))]


if __name__ == "__main__":
    measure.main(__doc__, cases)
