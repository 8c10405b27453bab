"""Decode attention beside FlashAttention-3, each as a CUDA graph of calls over as many caches as fill 256 MB, so
that no call finds its keys in the L2 cache. GB/s count the keys and values that the lengths name, read once.

python tests/benchmarks/paged_decode.py [--check] [--out FILE]     FA3_SO=<library> adds FlashAttention-3
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import torch
from flash_prefill import attention_fp32, dense

from halfmoon.kernels.portable.paged_decode import paged_decode

PAGE = 64
ROTATION_BYTES = 256 << 20
SHAPES = ((1, 1024), (1, 8192), (1, 131072), (8, 1024), (8, 4096), (8, 8192), (8, 32768), (32, 2048), (64, 1024), (64, 8192), (128, 2048))


def check(seed: int) -> list[dict[str, Any]]:
    """Random lengths, eager and as a graph replayed for other lengths than it was captured with."""
    generator = random.Random(seed)
    rows = []
    for head_dim, heads, kv_heads in ((128, 32, 8), (64, 8, 8), (256, 8, 2), (80, 12, 4), (128, 16, 1)):
        for num_seqs in (1, 3, 37):
            longest = generator.choice((500, 3000))
            pages, table = measure.random_pages(num_seqs, longest, kv_heads, head_dim, PAGE)
            q = torch.randn(num_seqs, heads, head_dim, device="cuda", dtype=torch.bfloat16)
            lens = torch.full((num_seqs,), longest, dtype=torch.int32, device="cuda")
            out: list[torch.Tensor] = []

            def run(q=q, pages=pages, table=table, lens=lens, out=out, longest=longest) -> None:
                out[:] = [paged_decode(q, pages, table, lens, max_kv_len=longest, scale=q.shape[-1] ** -0.5)]

            replay = measure.captured(run)
            worst = 0.0
            for _ in range(3):
                new = [generator.randint(1, longest) for _ in range(num_seqs)]
                lens.copy_(torch.tensor(new, dtype=torch.int32))
                replay()
                replayed = out[0].clone()
                eager = paged_decode(q, pages, table, lens, max_kv_len=longest, scale=head_dim**-0.5)
                for s, kv_len in enumerate(new):
                    k, v = (x[0] for x in dense(pages, table[s : s + 1], kv_len))
                    reference = attention_fp32(q[s][:, None], k, v, True)
                    worst = max(
                        worst, measure.relative_error(replayed[s][:, None], reference), measure.relative_error(eager[s][:, None], reference)
                    )
            row = {"check": f"hd{head_dim} {heads}/{kv_heads} batch {num_seqs}", "error": worst, "ok": worst < 6e-3}
            rows.append(row)
            measure.show(f"check {row['check']:24s} {worst:.1e}" + ("" if row["ok"] else "  WRONG"))
    return rows


def candidates(num_seqs: int, kv_len: int, fa3: Any) -> tuple[int, dict[str, Callable[[], object]]]:
    """How many calls a graph makes, each over a cache of its own as the layers of a model do, and the graphs."""
    heads, kv_heads, head_dim = 32, 8, 128
    num_calls = max(2, min(64, ROTATION_BYTES // (num_seqs * kv_len * kv_heads * head_dim * 4)))
    q = torch.randn(num_seqs, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    lens = torch.full((num_seqs,), kv_len, dtype=torch.int32, device="cuda")
    ours, theirs = [], []
    for _ in range(num_calls):
        pages, table = measure.random_pages(num_seqs, kv_len, kv_heads, head_dim, PAGE)
        ours.append(partial(paged_decode, q, pages, table, lens, max_kv_len=kv_len, scale=head_dim**-0.5))
        if fa3 is not None:
            k, v = (x.transpose(1, 2).contiguous() for x in pages)
            theirs.append(partial(fa3, q[:, None], k, v, used=lens, max_q=1, max_k=kv_len, table=table))
    graphs: dict[str, Callable[[], object]] = {"portable": measure.captured(*ours)}
    return num_calls, {**graphs, "fa3": measure.captured(*theirs)} if theirs else graphs


def compare(num_seqs: int, kv_len: int, fa3: Any, rows: list[dict[str, Any]]) -> None:
    num_calls, graphs = candidates(num_seqs, kv_len, fa3)
    times = {name: ms / num_calls for name, ms in measure.interleaved(graphs).items()}
    num_bytes = 2.0 * num_seqs * kv_len * 8 * 128 * 2
    rows.append(measure.moved(f"decode {num_seqs} x {kv_len}", num_bytes, times))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="compare with fp32 before timing")
    options.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options.add_argument("--out", help="JSON file to write")
    args = options.parse_args()
    torch.manual_seed(args.seed)
    rows = check(args.seed) if args.check else []
    if not all(row["ok"] for row in rows):
        measure.write(args.out, rows)
        raise SystemExit("wrong results; nothing was timed")
    fa3 = measure.load_fa3()
    for num_seqs, kv_len in SHAPES:
        compare(num_seqs, kv_len, fa3, rows)
    measure.write(args.out, rows)


if __name__ == "__main__":
    main()
