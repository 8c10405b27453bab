"""Prefill attention beside torch's cuDNN and FlashAttention-2 (scaled_dot_product_attention, dense) and FlashAttention-3 (paged).

halfmoon bench flash_prefill [--check] [--quick] [--out FILE]     FA3_SO=<library> adds FlashAttention-3

--check compares with fp32 first, on random lengths, and fails where our error is above twice torch's own. TFLOP/s count 4·d operations a
(query, key) pair that the mask keeps, half of the square for causal. `hopper` is what serving calls; where it hands a call on to
`portable`, both show the same.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import measure
import torch
import torch.nn.functional as F
from measure import Calls, Case, Row
from torch.nn.attention import SDPBackend, sdpa_kernel

from halfmoon.kernels.reference.flash_prefill import flash_prefill as in_torch
from halfmoon.kernels.reference.fp8 import to_pages

PAGE = 64
TOKENS = 16384
MODULES = ("hopper", "portable")
INHERITED_SHAPES = ((32, 8, 256, 256, 256), (32, 8, 256, 256, 1024), (32, 8, 1024, 1024, 256), (32, 8, 1024, 1024, 1024))
E4M3 = torch.float8_e4m3fn
HALF = 2  # of 64 x 64 blocks are kept, in the case with a block mask: every other one, and the diagonal


def modules() -> tuple[str, ...]:
    return MODULES if torch.cuda.get_device_capability()[0] == 9 else ("portable",)


def paged_call(
    module: str, q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, q_lens: Sequence[int], kv_lens: Sequence[int], **options: Any
) -> Callable[[], Any]:
    cu_seqlens_q = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    lens = torch.tensor(kv_lens, dtype=torch.int32, device="cuda")
    function = in_torch if module == "torch" else importlib.import_module(f"halfmoon.kernels.{module}.flash_prefill").flash_prefill
    named = {"max_seqlen_q": max(q_lens), "max_kv_len": max(kv_lens), "scale": q.shape[-1] ** -0.5, **options}
    return partial(function, q, pages, table, cu_seqlens_q, lens, **named)


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


def poisoned(num_seqs: int, kv_lens: Sequence[int], kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pages; the last page's tail holds large numbers, pages behind it NaN: what lies behind a sequence must not count."""
    pages, table = measure.random_pages(num_seqs, max(kv_lens), kv_heads, head_dim, PAGE)
    for s, kv_len in enumerate(kv_lens):
        if kv_len % PAGE:
            pages[:, table[s, kv_len // PAGE].long(), :, kv_len % PAGE :] = 1.0e4
        if -(-kv_len // PAGE) < table.shape[1]:
            pages[:, table[s, -(-kv_len // PAGE) :].long()] = float("nan")
    return pages, table


def check(seed: int) -> list[Row]:
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = random.Random(seed)
    rows = [check_batch(generator, d, *heads, causal) for d in (64, 128, 256) for heads in ((8, 8), (16, 4)) for causal in (True, False)]
    return rows + check_features(generator)


def check_batch(generator: random.Random, head_dim: int, heads: int, kv_heads: int, causal: bool) -> Row:
    num_seqs = generator.randint(1, 5)
    q_lens = [generator.choice((1, 63, 64, 128, 200, 391, 700)) for _ in range(num_seqs - 1)] + [generator.randint(129, 900)]
    kv_lens = [n + generator.choice((0, 0, 64, 77, 500)) for n in q_lens]
    pages, table = poisoned(num_seqs, kv_lens, kv_heads, head_dim)
    q = torch.randn(sum(q_lens), heads + 2 * kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)[:, :heads]
    outs = {name: paged_call(name, q, pages, table, q_lens, kv_lens, causal=causal)() for name in modules()}
    first, errors = 0, dict.fromkeys((*modules(), "sdpa"), 0.0)
    for s, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        k, v = (x[0] for x in dense(pages, table[s : s + 1, : -(-kv_len // PAGE)], kv_len))
        mine = q[first : first + q_len].transpose(0, 1)
        reference = attention_fp32(mine, k, v, causal)
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device="cuda").tril(kv_len - q_len) if causal else None
        wide = [x.repeat_interleave(heads // kv_heads, 0)[None] for x in (k, v)]
        outs["sdpa"] = F.scaled_dot_product_attention(mine[None], *wide, mask)[0].transpose(0, 1)
        for name, out in outs.items():
            part = out if name == "sdpa" else out[first : first + q_len]
            errors[name] = max(errors[name], measure.relative_error(part.transpose(0, 1), reference))
        first += q_len
    name = f"prefill hd{head_dim} {heads}/{kv_heads} {'causal' if causal else 'full'}"
    return measure.checked(name, errors, 2 * errors["sdpa"], q_lens=q_lens, kv_lens=kv_lens)


def check_features(generator: random.Random) -> list[Row]:
    """Each feature over a random batch, out and LSE, against torch in fp32 on the same pages (for fp8: on the numbers that they hold)."""
    rows = []
    scales = torch.rand(2, 4, device="cuda") + 0.5
    cases = {
        "fp8": (128, {"kv_scales": scales}),
        "window": (128, {"sliding_window": 100}),
        "soft cap": (128, {"logit_soft_cap": 20.0}),
        "lse": (128, {"return_lse": True}),
        "block mask": (128, {"block_mask": torch.rand(3, 16, 8, 16, device="cuda") < 0.5}),
        "block mask, one for all heads, hd256": (256, {"block_mask": torch.rand(3, 1, 8, 16, device="cuda") < 0.5, "causal": False}),
        "hd80": (80, {}),
        "hd512": (512, {"return_lse": True, "sliding_window": 300}),
        "hd512 causal": (512, {}),
        "hd1024 causal": (1024, {}),
        "hd1024 full": (1024, {"causal": False}),
    }
    for name, (head_dim, options) in cases.items():
        q_lens = [generator.randint(1, 500) for _ in range(3)]
        kv_lens = [n + generator.randint(0, 500) for n in q_lens]
        rows.append(check_feature(name, head_dim, q_lens, kv_lens, options))
    rows.append(check_feature("keys split", 128, [40], [20000], {"return_lse": True}))
    rows.append(check_feature("keys split, fp8", 128, [100], [20000], {"kv_scales": scales, "sliding_window": 15000}))
    rows.append(check_feature("fp8 widened", 128, [700, 900], [1000, 4000], {"kv_scales": scales}))
    return rows


def check_feature(name: str, head_dim: int, q_lens: Sequence[int], kv_lens: Sequence[int], options: dict[str, Any]) -> Row:
    pages, table = poisoned(len(q_lens), kv_lens, 4, head_dim)
    if "kv_scales" in options:  # fp8 has no such large numbers, and the widened pages must be finite
        pages = torch.stack(
            [to_pages(x.nan_to_num(1.0).transpose(1, 2), E4M3, s).transpose(1, 2) for x, s in zip(pages, options["kv_scales"], strict=True)]
        )
    q = torch.randn(sum(q_lens), 16, head_dim, device="cuda", dtype=torch.bfloat16)
    reference = paged_call("torch", q.float(), pages, table, q_lens, kv_lens, **options)()
    errors = {}
    for module in modules():
        out = paged_call(module, q, pages, table, q_lens, kv_lens, **options)()
        if options.get("return_lse"):
            errors[f"{module} lse"] = measure.relative_error(out[1], reference[1])
            out = out[0]
        errors[module] = measure.relative_error(out, reference[0] if options.get("return_lse") else reference)
    return measure.checked(f"prefill {name}", errors, 5e-3, q_lens=list(q_lens), kv_lens=list(kv_lens))


def sdpa(q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, length: int, causal: bool) -> Calls:
    """torch's own over dense K and V: they are spared the pages."""
    heads = q.view(table.shape[0], length, q.shape[1], q.shape[2]).transpose(1, 2)
    k, v = dense(pages, table, length)
    gqa = q.shape[1] != pages.shape[2]

    def run(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(heads, k, v, is_causal=causal, enable_gqa=gqa)

    return {"cudnn": partial(run, SDPBackend.CUDNN_ATTENTION), "fa2": partial(run, SDPBackend.FLASH_ATTENTION)}


def fa3_call(q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, q_len: int, kv_len: int, causal: bool) -> Calls:
    fa3 = measure.load_fa3()
    if fa3 is None:
        return {}
    num_seqs = table.shape[0]
    k, v = (x.transpose(1, 2).contiguous() for x in pages)
    cu_q = torch.arange(num_seqs + 1, device="cuda", dtype=torch.int32) * q_len
    used = torch.full((num_seqs,), kv_len, device="cuda", dtype=torch.int32)
    return measure.present({"fa3": partial(fa3, q, k, v, cu_q=cu_q, used=used, max_q=q_len, max_k=kv_len, table=table, causal=causal)})


def attention_row(case: str, pairs: float, q: torch.Tensor, kv_bytes: float, calls: Calls, **more: Any) -> Row:
    """pairs: (query, key) pairs that the mask keeps, of all heads."""
    flops, num_bytes = 4.0 * pairs * q.shape[-1], 2.0 * q.nbytes + kv_bytes
    return measure.timed("flash_prefill", case, flops, num_bytes, measure.interleaved(calls), compute=True, **more)


def prompts(head_dim: int, heads: int, kv_heads: int, causal: bool, length: int, case: str) -> Row:
    num_seqs = TOKENS // length
    pages, table = measure.random_pages(num_seqs, length, kv_heads, head_dim, PAGE)
    q = torch.randn(TOKENS, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    ours = {m: paged_call(m, q, pages, table, [length] * num_seqs, [length] * num_seqs, causal=causal) for m in modules()}
    others = {**fa3_call(q, pages, table, length, length, causal), **measure.present(sdpa(q, pages, table, length, causal))}
    pairs = num_seqs * heads * length * length * (0.5 if causal else 1.0)
    return attention_row(case, pairs, q, pages.nbytes, {**ours, **others})


def chunk(num_queries: int, prefix: int, case: str, stored: torch.dtype = torch.bfloat16, **options: Any) -> Row:
    """One chunk over a paged prefix, 32/8 heads of 128."""
    kv_len = prefix + num_queries
    pages, table = measure.random_pages(1, kv_len, 8, 128, PAGE, stored)
    q = torch.randn(num_queries, 32, 128, device="cuda", dtype=torch.bfloat16)
    calls: Calls = {m: paged_call(m, q, pages, table, [num_queries], [kv_len], **options) for m in modules()}
    pairs = num_queries * prefix + num_queries * num_queries / 2
    if "block_mask" in options:
        pairs /= HALF
        calls["portable, no mask"] = paged_call("portable", q, pages, table, [num_queries], [kv_len])
    elif "sliding_window" in options:
        pairs = num_queries * options["sliding_window"]
    if stored == torch.bfloat16 and not options:
        calls |= fa3_call(q, pages, table, num_queries, kv_len, True)
    return attention_row(case, 32 * pairs, q, pages.nbytes, calls)


def half_mask(num_queries: int, kv_len: int) -> torch.Tensor:
    rows, columns = torch.arange(num_queries // 64, device="cuda")[:, None], torch.arange(kv_len // 64, device="cuda")
    return ((rows + columns) % HALF == 0)[None, None]


def inherited(batch: int, heads: int, n: int, m: int, d: int, case: str) -> Row:
    """Full attention [batch, heads, N, M, d] beside matmul, softmax, matmul in torch. Errors against fp32 are of the first sequence."""
    q, k, v = (torch.randn(batch, heads, x, d, device="cuda", dtype=torch.bfloat16) for x in (n, m, m))
    each = m // PAGE
    pages = torch.stack([x.view(batch, heads, each, PAGE, d).transpose(1, 2).reshape(-1, heads, PAGE, d) for x in (k, v)])
    table = torch.arange(batch * each, device="cuda", dtype=torch.int32).view(batch, each)
    flat = q.transpose(1, 2).reshape(batch * n, heads, d)
    calls: Calls = {module: paged_call(module, flat, pages, table, [n] * batch, [m] * batch, causal=False) for module in modules()}
    reference = attention_fp32(q[0], k[0], v[0], False).transpose(0, 1)
    errors = {f"error {name}": measure.relative_error(call()[:n], reference) for name, call in calls.items()}  # type: ignore[index]
    calls["torch"] = lambda: (q @ k.mT * d**-0.5).softmax(-1) @ v
    return attention_row(case, float(batch * heads * n * m), flat, pages.nbytes, calls, **errors)


def cases(quick: bool) -> list[Case]:
    found: list[Case] = []

    def add(name: str, function: Callable[..., Row], *arguments: Any, **options: Any) -> None:
        found.append(Case("flash_prefill", name, partial(function, *arguments, case=name, **options)))

    for shape in INHERITED_SHAPES:
        add(str(list(shape)), inherited, *shape)
    for heads, kv_heads in ((32, 8),) if quick else ((16, 16), (32, 8)):
        for length in (2048, 8192) if quick else (1024, 2048, 4096, 8192, 16384):
            add(f"hd128 causal {heads}/{kv_heads} {TOKENS // length} x {length}", prompts, 128, heads, kv_heads, True, length)
    for num_queries, prefix in ((2048, 8192), (2048, 32768), (128, 32768), (16, 32768)):
        add(f"chunk {num_queries} over {prefix}", chunk, num_queries, prefix)
    add("chunk 2048 over 32768, fp8", chunk, 2048, 32768, stored=E4M3)
    add("chunk 64 over 32768, fp8", chunk, 64, 32768, stored=E4M3)
    add("chunk 2048 over 8192, window 4096", chunk, 2048, 8192, sliding_window=4096)
    add("chunk 2048 over 8192, soft cap", chunk, 2048, 8192, logit_soft_cap=30.0)
    add("chunk 2048 over 8192, lse", chunk, 2048, 8192, return_lse=True)
    add("chunk 2048 over 8192, half of the blocks", masked_chunk)
    for length in (8192,) if quick else (2048, 4096, 8192, 16384):
        add(f"hd128 full 16/16 {TOKENS // length} x {length}", prompts, 128, 16, 16, False, length)
        add(f"hd64 causal 32/32 {TOKENS // length} x {length}", prompts, 64, 32, 32, True, length)
        add(f"hd256 causal 8/8 {TOKENS // length} x {length}", prompts, 256, 8, 8, True, length)
    return found


def masked_chunk(case: str) -> Row:
    return chunk(2048, 8192, case, block_mask=half_mask(2048, 10240))


if __name__ == "__main__":
    measure.main(__doc__, cases, check)
