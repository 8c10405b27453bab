"""Decode attention beside FlashAttention-3, each as a CUDA graph of calls over as many caches as fill 256 MB, so
that no call finds its keys in the L2 cache. GB/s count the keys and values that the lengths name, read once.

halfmoon bench paged_decode [--check] [--quick] [--out FILE]     FA3_SO=<library> adds FlashAttention-3
"""

from __future__ import annotations

import random
from functools import partial

import measure
import torch
from flash_prefill import E4M3
from measure import Case, Row

from halfmoon.kernels.portable.paged_decode import paged_decode
from halfmoon.kernels.reference.paged_decode import paged_decode as in_torch

PAGE = 64
ROTATION_BYTES = 256 << 20
SHAPES = ((1, 1024), (1, 8192), (1, 131072), (8, 1024), (8, 4096), (8, 8192), (8, 32768), (32, 2048), (64, 1024), (64, 8192), (128, 2048))
QUICK = ((1, 8192), (8, 8192), (8, 32768), (32, 2048), (64, 8192), (128, 2048))
SEVERAL = (1, 2, 4, 8)  # query tokens a sequence


def check(seed: int) -> list[Row]:
    """Random lengths, eager and as a graph replayed for other lengths than it was captured with, against torch in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = random.Random(seed)
    shapes = [
        (128, 32, 8, 1),
        (64, 8, 8, 1),
        (256, 8, 2, 1),
        (80, 12, 4, 1),
        (128, 16, 1, 1),
        (128, 32, 8, 4),
        (128, 32, 8, 12),
        (64, 8, 8, 2),
    ]
    rows = [check_shape(generator, *shape, num_seqs, torch.bfloat16) for shape in shapes for num_seqs in (1, 3, 37)]
    rows += [check_shape(generator, *shape, num_seqs, E4M3) for shape in (shapes[0], shapes[2], shapes[5]) for num_seqs in (1, 37)]
    rows.append(check_shape(generator, 128, 32, 8, 4, 5, E4M3, sliding_window=333, logit_soft_cap=20.0))
    return rows


def check_shape(
    generator: random.Random, head_dim: int, heads: int, kv_heads: int, num_q: int, num_seqs: int, stored: torch.dtype, **options: float
) -> Row:
    longest = generator.choice((500, 3000))
    pages, table = measure.random_pages(num_seqs, longest, kv_heads, head_dim, PAGE, stored)
    scales = torch.rand(2, kv_heads, device="cuda") + 0.5 if stored == E4M3 else None
    q = torch.randn(num_seqs, num_q, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    lens = torch.full((num_seqs,), longest, dtype=torch.int32, device="cuda")
    call = partial(paged_decode, q, pages, table, lens, max_kv_len=longest, scale=head_dim**-0.5, kv_scales=scales, **options)
    out: list[torch.Tensor] = []

    def run() -> None:
        out[:] = [call()]

    replay = measure.captured(run)
    errors = {"graph": 0.0, "eager": 0.0}
    for _ in range(3):
        lens.copy_(torch.tensor([generator.randint(0 if num_seqs > 1 else 1, longest) for _ in range(num_seqs)], dtype=torch.int32))
        replay()
        reference = in_torch(q.float(), pages, table, lens, max_kv_len=longest, scale=head_dim**-0.5, kv_scales=scales, **options)
        errors["graph"] = max(errors["graph"], measure.relative_error(out[0], reference))
        errors["eager"] = max(errors["eager"], measure.relative_error(call(), reference))
    kind = "fp8" if stored == E4M3 else "bf16"
    return measure.checked(f"decode {kind} hd{head_dim} {heads}/{kv_heads}, {num_q} of {num_seqs} sequences", errors, 6e-3)


def decode(num_seqs: int, kv_len: int, case: str, stored: torch.dtype = torch.bfloat16, num_q: int = 1) -> Row:
    """A graph makes many calls, each over a cache of its own as the layers of a model do."""
    heads, kv_heads, head_dim = 32, 8, 128
    num_bytes = 2 * num_seqs * kv_len * kv_heads * head_dim * stored.itemsize
    num_calls = max(2, min(64, ROTATION_BYTES // num_bytes))
    q = torch.randn(num_seqs, num_q, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    lens = torch.full((num_seqs,), kv_len, dtype=torch.int32, device="cuda")
    fa3 = measure.load_fa3()
    fp8 = stored == E4M3
    descale = torch.ones(num_seqs, kv_heads, device="cuda") if fp8 else None
    ours, theirs = [], []
    for _ in range(num_calls):
        pages, table = measure.random_pages(num_seqs, kv_len, kv_heads, head_dim, PAGE, stored)
        ours.append(partial(paged_decode, q, pages, table, lens, max_kv_len=kv_len, scale=head_dim**-0.5))
        if fa3 is not None:
            k, v = (x.view(torch.uint8).transpose(1, 2).contiguous().view(stored) if fp8 else x.transpose(1, 2).contiguous() for x in pages)
            theirs.append(partial(fa3, q.to(stored), k, v, used=lens, max_q=num_q, max_k=kv_len, table=table, descale=descale))
    graphs = {"portable": measure.captured(*ours)}
    if theirs and measure.present({"fa3 fp8" if fp8 else "fa3": theirs[0]}):
        graphs["fa3"] = measure.captured(*theirs)
    times = {name: ms / num_calls for name, ms in measure.interleaved(graphs).items()}
    return measure.timed("paged_decode", case, 4.0 * num_seqs * num_q * kv_len * heads * head_dim, num_bytes, times, compute=False)


def cases(quick: bool) -> list[Case]:
    shapes = QUICK if quick else SHAPES
    found = [
        (f"{b} x {n}, {kind}", partial(decode, b, n, stored=of))
        for b, n in shapes
        for kind, of in (("bf16", torch.bfloat16), ("fp8", E4M3))
    ]
    found += [(f"32 x 2048, {n} query tokens", partial(decode, 32, 2048, num_q=n)) for n in SEVERAL]
    return [Case("paged_decode", name, partial(run, case=name)) for name, run in found]


if __name__ == "__main__":
    measure.main(__doc__, cases, check)
