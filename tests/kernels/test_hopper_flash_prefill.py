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
@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), [(64, 4, 4), (128, 8, 2), (256, 4, 1)])
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


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"head_dim": 80}, False),
        ({"head_dim": 256}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, True),
        ({"page_size": 48}, False),
        ({"page_size": 16}, True),
        ({"page_size": 192}, True),
        ({"max_seqlen_q": 63}, False),
        ({"special": True}, False),
        ({"offset": 1}, False),
        ({"offset": 8}, True),
    ],
    ids=str,
)
def test_a_call_that_the_tensor_copies_cannot_serve_goes_to_the_portable_kernel(change: dict, fits: bool) -> None:
    from halfmoon.kernels.hopper.flash_prefill import _fits

    call = {"head_dim": 128, "dtype": torch.bfloat16, "page_size": 64, "max_seqlen_q": 64, "special": False, "offset": 0} | change
    storage = torch.zeros(70 * 2 * call["head_dim"] + 8, dtype=call["dtype"])
    q = storage[call["offset"] :][: 70 * 2 * call["head_dim"]].view(70, 2, call["head_dim"])
    pages = torch.zeros(2, 1, 1, call["page_size"], call["head_dim"], dtype=call["dtype"])
    assert _fits(q, pages, call["max_seqlen_q"], call["special"]) is fits


def test_heads_that_do_not_lie_side_by_side_go_to_the_portable_kernel() -> None:
    from halfmoon.kernels.hopper.flash_prefill import _fits

    q = torch.zeros(2, 70, 128, dtype=torch.bfloat16).transpose(0, 1)
    assert not _fits(q, torch.zeros(2, 1, 1, 64, 128, dtype=torch.bfloat16), 64, False)
