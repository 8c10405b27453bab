"""Prefill attention beside torch's cuDNN and FlashAttention-2 (scaled_dot_product_attention, dense) and FlashAttention-3 (paged).

python tests/benchmarks/flash_prefill.py [--check] [--quick] [--out FILE]     FA3_SO=<library> adds FlashAttention-3

--check compares with fp32 first, on random lengths, and fails where our error is above twice torch's own. TFLOP/s count 4·d operations a
(query, key) pair that the mask keeps, half of the square for causal.
"""

from __future__ import annotations

import argparse
import importlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PAGE = 64
TOKENS = 16384
MODULES = ("hopper", "portable")
INHERITED_SHAPES = ((32, 8, 256, 256, 256), (32, 8, 256, 256, 1024), (32, 8, 1024, 1024, 256), (32, 8, 1024, 1024, 1024))


def kernel(module: str) -> Callable[..., torch.Tensor]:
    return importlib.import_module(f"halfmoon.kernels.{module}.flash_prefill").flash_prefill


def paged_call(
    module: str,
    q: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    causal: bool = True,
) -> Callable[[], torch.Tensor]:
    cu_seqlens_q = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    lens = torch.tensor(kv_lens, dtype=torch.int32, device="cuda")
    function = kernel(module)
    return lambda: function(
        q, pages, table, cu_seqlens_q, lens, max_seqlen_q=max(q_lens), max_kv_len=max(kv_lens), scale=q.shape[-1] ** -0.5, causal=causal
    )


def dense(pages: torch.Tensor, table: torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [num_seqs, num_kv_heads, kv_len, head_dim] of the pages."""
    num_seqs, each = table.shape
    gathered = pages[:, table.reshape(-1).long()].view(2, num_seqs, each, *pages.shape[2:]).transpose(2, 3)
    k, v = gathered.reshape(2, num_seqs, pages.shape[2], -1, pages.shape[4])[..., :kv_len, :].unbind(0)
    return k.contiguous(), v.contiguous()


def attention_fp32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q [heads, queries, d] against k, v [kv_heads, keys, d], queries being the last positions; in fp32, whatever the inputs are."""
    group = q.shape[0] // k.shape[0]
    scores = q.float() @ k.float().repeat_interleave(group, 0).transpose(1, 2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[1] - q.shape[1] + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ v.float().repeat_interleave(group, 0)


def check(seed: int) -> list[dict[str, Any]]:
    """Random batches against fp32. The last page's tail is poisoned with large numbers: what lies behind a sequence must not count."""
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = random.Random(seed)
    rows = []
    for head_dim in (64, 128, 256):
        for heads, kv_heads in ((8, 8), (16, 4)):
            for causal in (True, False):
                num_seqs = generator.randint(1, 5)
                q_lens = [generator.choice((1, 63, 64, 128, 200, 391, 700)) for _ in range(num_seqs - 1)] + [generator.randint(129, 900)]
                kv_lens = [n + generator.choice((0, 0, 64, 77, 500)) for n in q_lens]
                pages, table = measure.random_pages(num_seqs, max(kv_lens), kv_heads, head_dim, PAGE)
                for s, kv_len in enumerate(kv_lens):
                    if kv_len % PAGE:
                        pages[:, table[s, kv_len // PAGE].long(), :, kv_len % PAGE :] = 1.0e4
                    if kv_len // PAGE + 1 < table.shape[1]:
                        pages[:, table[s, kv_len // PAGE + 1 :].long()] = float("nan")
                fused = torch.randn(sum(q_lens), heads + 2 * kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
                q = fused[:, :heads]
                outs = {name: paged_call(name, q, pages, table, q_lens, kv_lens, causal)() for name in MODULES}
                first, errors = 0, dict.fromkeys((*MODULES, "sdpa"), 0.0)
                for s, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
                    k, v = (x[0] for x in dense(pages, table[s : s + 1, : -(-kv_len // PAGE)], kv_len))
                    mine = q[first : first + q_len].transpose(0, 1)
                    reference = attention_fp32(mine, k, v, causal)
                    group = heads // kv_heads
                    mask = torch.ones(q_len, kv_len, dtype=torch.bool, device="cuda").tril(kv_len - q_len) if causal else None
                    sdpa = F.scaled_dot_product_attention(
                        mine[None], k.repeat_interleave(group, 0)[None], v.repeat_interleave(group, 0)[None], mask
                    )
                    errors["sdpa"] = max(errors["sdpa"], measure.relative_error(sdpa[0], reference))
                    for name, out in outs.items():
                        error = measure.relative_error(out[first : first + q_len].transpose(0, 1), reference)
                        errors[name] = max(errors[name], error)
                    first += q_len
                row = {
                    "check": f"hd{head_dim} {heads}/{kv_heads} {'causal' if causal else 'full'}",
                    "q_lens": q_lens,
                    "kv_lens": kv_lens,
                    **errors,
                }
                rows.append(row)
                bad = [name for name in MODULES if not errors[name] <= 2 * errors["sdpa"]]
                measure.show(f"check {row['check']:18s} " + " ".join(f"{k}={e:.1e}" for k, e in errors.items()) + f" {q_lens} {kv_lens}"
                             + (f"  WRONG: {bad}" if bad else ""))  # fmt: skip
                row["ok"] = not bad
    return rows


def peers(q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, length: int, causal: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """torch's own over dense K and V: they are spared the pages."""
    num_seqs = table.shape[0]
    heads = q.view(num_seqs, length, q.shape[1], q.shape[2]).transpose(1, 2)
    k, v = dense(pages, table, length)
    gqa = q.shape[1] != pages.shape[2]

    def sdpa(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(heads, k, v, is_causal=causal, enable_gqa=gqa)

        return run

    return {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "fa2": sdpa(SDPBackend.FLASH_ATTENTION)}


def fa3_call(
    q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, num_seqs: int, q_len: int, kv_len: int, causal: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    fa3 = measure.load_fa3()
    if fa3 is None:
        return {}
    k, v = (x.transpose(1, 2).contiguous() for x in pages)
    cu_q = torch.arange(num_seqs + 1, device="cuda", dtype=torch.int32) * q_len
    used = torch.full((num_seqs,), kv_len, device="cuda", dtype=torch.int32)
    return {"fa3": lambda: fa3(q, k, v, cu_q=cu_q, used=used, max_q=q_len, max_k=kv_len, table=table, causal=causal)}


def compare(name: str, flops: float, candidates: dict[str, Callable[[], torch.Tensor]], rows: list[dict[str, Any]]) -> None:
    times = measure.interleaved(candidates)
    rows.append({"case": name, "ms": times, "tflops": {k: flops / t / 1e9 for k, t in times.items()}})
    measure.show(f"{name:34s} " + "  ".join(f"{k} {flops / t / 1e9:6.1f}" for k, t in times.items()))


def prompts(head_dim: int, heads: int, kv_heads: int, causal: bool, lengths: Sequence[int], rows: list[dict[str, Any]]) -> None:
    for length in lengths:
        num_seqs = TOKENS // length
        pages, table = measure.random_pages(num_seqs, length, kv_heads, head_dim, PAGE)
        q = torch.randn(TOKENS, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        ours = {m: paged_call(m, q, pages, table, [length] * num_seqs, [length] * num_seqs, causal) for m in MODULES}
        flops = 4.0 * num_seqs * heads * length * length * head_dim * (0.5 if causal else 1)
        others = {**fa3_call(q, pages, table, num_seqs, length, length, causal), **peers(q, pages, table, length, causal)}
        compare(f"hd{head_dim} {'causal' if causal else 'full'} {heads}/{kv_heads} {num_seqs} x {length}", flops, {**ours, **others}, rows)


def chunks(rows: list[dict[str, Any]], chunk: int = 2048) -> None:
    for prefix in (8192, 32768):
        kv_len = prefix + chunk
        pages, table = measure.random_pages(1, kv_len, 8, 128, PAGE)
        q = torch.randn(chunk, 32, 128, device="cuda", dtype=torch.bfloat16)
        ours = {m: paged_call(m, q, pages, table, [chunk], [kv_len]) for m in MODULES}
        flops = 4.0 * 32 * 128 * (chunk * prefix + chunk * chunk / 2)
        compare(f"chunk {chunk} over {prefix} 32/8", flops, {**ours, **fa3_call(q, pages, table, 1, chunk, kv_len, True)}, rows)


def inherited(rows: list[dict[str, Any]]) -> None:
    """Full attention [batch, heads, N, M, d] beside matmul, softmax, matmul in torch. Ours takes d up to 256; a wider d has no row."""
    for batch, heads, n, m, d in INHERITED_SHAPES:
        q, k, v = (torch.randn(batch, heads, x, d, device="cuda", dtype=torch.bfloat16) for x in (n, m, m))
        candidates: dict[str, Callable[[], torch.Tensor]] = {
            "torch": lambda q=q, k=k, v=v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        }
        if d <= 256:
            each = m // PAGE
            pages = torch.stack([x.view(batch, heads, each, PAGE, d).transpose(1, 2).reshape(-1, heads, PAGE, d) for x in (k, v)])
            table = torch.arange(batch * each, device="cuda", dtype=torch.int32).view(batch, each)
            flat = q.transpose(1, 2).reshape(batch * n, heads, d)
            for module in MODULES:
                candidates[module] = paged_call(module, flat, pages, table, [n] * batch, [m] * batch, causal=False)
        compare(f"[{batch}, {heads}, {n}, {m}, {d}]", 4.0 * batch * heads * n * m * d, candidates, rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="compare with fp32 before timing")
    options.add_argument("--quick", action="store_true", help="only causal head_dim 128")
    options.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options.add_argument("--out", help="JSON file to write")
    args = options.parse_args()
    torch.manual_seed(args.seed)
    rows = check(args.seed) if args.check else []
    if not all(row["ok"] for row in rows):
        measure.write(args.out, rows)
        raise SystemExit("wrong results; nothing was timed")
    lengths = (1024, 2048, 4096, 8192, 16384)
    prompts(128, 16, 16, True, lengths, rows)
    prompts(128, 32, 8, True, lengths, rows)
    chunks(rows)
    if not args.quick:
        prompts(128, 16, 16, False, lengths[1:], rows)
        prompts(64, 32, 32, True, lengths[1:], rows)
        prompts(256, 8, 8, True, lengths[1:], rows)
        inherited(rows)
    measure.write(args.out, rows)


if __name__ == "__main__":
    main()
