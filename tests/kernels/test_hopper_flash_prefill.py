"""The Gluon prefill kernel. It runs on Hopper only; what decides which calls it takes is tested anywhere, and its compilation is in
test_compile_ahead.py."""

from __future__ import annotations

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # as the portable kernels' tests want it, should this file be the first to import triton
pytest.importorskip("triton", reason="triton is not installed")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q [queries, heads, d], the last positions of k, v [keys, kv_heads, d]; in fp64."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[0] - q.shape[0] + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double().repeat_interleave(group, 1))


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), [(64, 4, 4), (128, 8, 2), (256, 4, 1), (512, 4, 4), (1024, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_batch_matches_fp64(dtype, head_dim: int, num_heads: int, num_kv_heads: int, page_size: int, causal: bool) -> None:
    from halfmoon.kernels.hopper.flash_prefill import flash_prefill

    q_lens, kv_lens = [200, 1, 391, 64, 129], [200, 333, 400, 127, 700]
    each = -(-max(kv_lens) // page_size)
    pages = torch.randn(2, each * len(q_lens), num_kv_heads, page_size, head_dim, device="cuda").to(dtype)
    table = torch.randperm(pages.shape[1], device="cuda", dtype=torch.int32).view(len(q_lens), each)
    for row, kv_len in zip(table.long(), kv_lens, strict=True):
        pages[:, row[kv_len // page_size :][:1], :, kv_len % page_size :] = 1e4  # finite, as the kernel asks
        pages[:, row[kv_len // page_size + 1 :]] = math.nan  # pages that are not the sequence's own
    q = torch.randn(sum(q_lens) + 300, num_heads + 2, head_dim, device="cuda").to(dtype)[:, :num_heads]  # 300 tokens are nobody's
    bounds = torch.tensor([0, *q_lens], device="cuda").cumsum(0).int()
    for _ in range(2):  # the second call finds the counter as the first left it
        out = flash_prefill(
            q, pages, table, bounds, torch.tensor(kv_lens, dtype=torch.int32, device="cuda"),
            max_seqlen_q=max(q_lens), max_kv_len=max(kv_lens), scale=head_dim**-0.5, causal=causal,
        )  # fmt: skip
        first = 0
        for row, q_len, kv_len in zip(table.long(), q_lens, kv_lens, strict=True):
            k, v = pages[:, row].transpose(2, 3).reshape(2, -1, num_kv_heads, head_dim)[:, :kv_len].unbind(0)
            reference = expected(q[first : first + q_len], k, v, causal)
            assert float((out[first : first + q_len].double() - reference).norm() / reference.norm()) < 5e-3
            first += q_len


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("loudness", [0.1, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("workspace_bytes", [1 << 30, 8 << 20], ids=["one strip", "several strips"])
def test_wide_heads_match_fp64_however_far_apart_the_scores_of_their_tiles_lie(
    workspace_bytes: int, loudness: float, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfmoon.kernels.hopper import flash_prefill, wide_prefill

    monkeypatch.setattr(wide_prefill, "WORKSPACE_BYTES", workspace_bytes)
    monkeypatch.setattr(flash_prefill, "portable_flash_prefill", None)
    q_lens, kv_lens, heads, kv_heads, head_dim = [1500, 70, 257], [3000, 2000, 300], 4, 2, 512
    pages = torch.randn(2, 47 * 3, kv_heads, 64, head_dim, device="cuda").to(torch.bfloat16)
    pages[0] *= torch.rand(47 * 3, 1, 1, 1, device="cuda").to(torch.bfloat16) * 2  # some pages are louder than others
    table = torch.randperm(47 * 3, device="cuda", dtype=torch.int32).view(3, 47)
    q = (torch.randn(sum(q_lens), heads, head_dim, device="cuda") * loudness).to(torch.bfloat16)
    out = flash_prefill.flash_prefill(
        q, pages, table, torch.tensor([0, *q_lens], device="cuda").cumsum(0).int(), torch.tensor(kv_lens, dtype=torch.int32, device="cuda"),
        max_seqlen_q=max(q_lens), max_kv_len=max(kv_lens), scale=head_dim**-0.5, causal=causal,
    )  # fmt: skip
    first = 0
    for row, q_len, kv_len in zip(table.long(), q_lens, kv_lens, strict=True):
        k, v = pages[:, row].transpose(2, 3).reshape(2, -1, kv_heads, head_dim)[:, :kv_len].unbind(0)
        reference = expected(q[first : first + q_len], k, v, causal)
        assert float((out[first : first + q_len].double() - reference).norm() / reference.norm()) < 5e-3
        first += q_len


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"head_dim": 80}, False),
        ({"head_dim": 256}, True),
        ({"head_dim": 512}, True),
        ({"head_dim": 768}, False),
        ({"head_dim": 1024}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, True),
        ({"page_size": 48}, False),
        ({"page_size": 16}, True),
        ({"page_size": 192}, True),
        ({"max_seqlen_q": 63}, False),
        ({"special": True}, False),
        ({"stored": torch.float8_e4m3fn}, True),
        ({"stored": torch.float16}, False),
        ({"offset": 1}, False),
        ({"offset": 8}, True),
    ],
    ids=str,
)
def test_a_call_that_the_tensor_copies_cannot_serve_goes_to_the_portable_kernel(change: dict, fits: bool) -> None:
    from halfmoon.kernels.hopper.flash_prefill import _fits

    call = {"head_dim": 128, "dtype": torch.bfloat16, "page_size": 64, "max_seqlen_q": 64, "special": False, "offset": 0} | change
    call.setdefault("stored", call["dtype"])
    storage = torch.zeros(70 * 2 * call["head_dim"] + 8, dtype=call["dtype"])
    q = storage[call["offset"] :][: 70 * 2 * call["head_dim"]].view(70, 2, call["head_dim"])
    pages = torch.zeros(2, 1, 1, call["page_size"], call["head_dim"], dtype=call["stored"])
    assert _fits(q, pages, call["max_seqlen_q"], call["special"]) is fits


def test_heads_that_do_not_lie_side_by_side_go_to_the_portable_kernel() -> None:
    from halfmoon.kernels.hopper.flash_prefill import _fits

    q = torch.zeros(2, 70, 128, dtype=torch.bfloat16).transpose(0, 1)
    assert not _fits(q, torch.zeros(2, 1, 1, 64, 128, dtype=torch.bfloat16), 64, False)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 8},
        {"logit_soft_cap": 5.0},
        {"return_lse": True},
        {"block_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_this_kernel_does_not_do_reaches_the_portable_one_whole(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfmoon.kernels.hopper import flash_prefill as module

    asked: list[dict] = []
    monkeypatch.setattr(module, "portable_flash_prefill", lambda *tensors, **named: asked.append(named))
    q, pages, bounds = torch.zeros(70, 2, 128, dtype=torch.bfloat16), torch.zeros(2, 2, 1, 64, 128, dtype=torch.bfloat16), [0, 70]
    common = {"max_seqlen_q": 70, "max_kv_len": 70, "scale": 0.1, "causal": True}
    module.flash_prefill(
        q, pages, torch.zeros(1, 2, dtype=torch.int32), torch.tensor(bounds, dtype=torch.int32), torch.tensor([70], dtype=torch.int32),
        **common, **options,
    )  # fmt: skip
    silent = {
        "sliding_window": 0,
        "logit_soft_cap": 0.0,
        "kv_scales": None,
        "block_mask": None,
        "return_lse": False,
        "usual_num_seqs": None,
    }
    assert asked == [{**common, **silent, **options}]


@pytest.mark.parametrize(
    ("num_tokens", "num_seqs", "max_kv_len", "stored", "pays"),
    [
        (2048, 1, 32768, torch.bfloat16, True),
        (512, 1, 32768, torch.bfloat16, True),
        (128, 1, 32768, torch.bfloat16, False),  # 32 items on 132 SMs
        (128, 1, 1024, torch.bfloat16, True),  # nothing to split
        (2048, 1, 32768, torch.float8_e4m3fn, True),
        (2048, 16, 2048, torch.float8_e4m3fn, True),
        (1024, 16, 2048, torch.float8_e4m3fn, False),  # 64 tokens read what widening would write
        (65536, 16, 65536, torch.float8_e4m3fn, False),  # 4 GB of widened pages
    ],
)
def test_few_queries_over_many_keys_go_to_the_kernel_that_splits_keys_or_reads_fp8(
    num_tokens: int, num_seqs: int, max_kv_len: int, stored: torch.dtype, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfmoon.kernels.hopper import flash_prefill as module

    monkeypatch.setattr(module, "num_sms", lambda _: 132)
    q = torch.empty(num_tokens, 32, 128, dtype=torch.bfloat16, device="meta")
    pages = torch.empty(2, 10, 8, 64, 128, dtype=stored, device="meta")
    assert module._pays(q, pages, num_seqs, max_kv_len, None) is pays
    roomy = module._pays(q, pages, 17 * num_seqs, max_kv_len, num_seqs)
    assert roomy is pays or stored != torch.bfloat16, "rows for sequences that seldom come choose no other kernel"
