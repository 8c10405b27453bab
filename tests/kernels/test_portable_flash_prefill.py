"""The Triton prefill kernel: in the interpreter where there is no GPU (fp16 and fp32; bf16 arithmetic is wrong there), on the GPU else."""

from __future__ import annotations

import math
import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.portable import flash_prefill as portable  # noqa: E402
from halfmoon.kernels.portable.flash_prefill import flash_prefill, packed_heads, tiles  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * CUDA
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
Q_LENS, KV_LENS = (66, 37, 1), (66, 110, 33)  # past two tiles of queries in fp32 and of keys in fp16; with a prefix; one query alone


def build(head_dim: int, page_size: int, dtype: torch.dtype, num_heads: int = 4, num_kv_heads: int = 2):
    """A batch over shuffled pages; what lies in the pages behind a sequence's last key is NaN."""
    torch.manual_seed(head_dim + page_size)
    each = -(-max(KV_LENS) // page_size)
    pages = torch.randn(2, each * len(KV_LENS) + 1, num_kv_heads, page_size, head_dim).to(dtype)
    table = torch.randperm(pages.shape[1] - 1, dtype=torch.int32).view(len(KV_LENS), each) + 1
    for row, kv_len in zip(table.long(), KV_LENS, strict=True):
        pages[:, row[kv_len // page_size :][:1], :, kv_len % page_size :] = math.nan
        pages[:, row[kv_len // page_size + 1 :]] = math.nan
    fused = torch.randn(sum(Q_LENS), num_heads + 3, head_dim).to(dtype)  # q as a view of a wider projection
    return fused[:, :num_heads], pages, table


def expected(q, pages, table, *, window: int = 0, cap: float = 0.0, causal: bool = True) -> torch.Tensor:
    out, first, group = [], 0, q.shape[1] // pages.shape[2]
    for row, q_len, kv_len in zip(table.long(), Q_LENS, KV_LENS, strict=True):
        k, v = (
            x[row].transpose(1, 2).reshape(-1, *x.shape[1::2])[:kv_len].double().repeat_interleave(group, 1)
            for x in pages
        )  # fmt: skip
        scores = torch.einsum("qhd,khd->hqk", q[first : first + q_len].double(), k) * q.shape[2] ** -0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        i, j = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
        hidden = ((j > i) & causal) | (window > 0) & (j <= i - window)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
        first += q_len
    return torch.cat(out)


def attend(q, pages, table, *, window: int = 0, cap: float = 0.0, causal: bool = True) -> torch.Tensor:
    bounds = torch.tensor([0, *Q_LENS]).cumsum(0).int()
    out = flash_prefill(
        q.to(DEVICE), pages.to(DEVICE), table.to(DEVICE), bounds.to(DEVICE), torch.tensor(KV_LENS, dtype=torch.int32).to(DEVICE),
        max_seqlen_q=max(Q_LENS), max_kv_len=max(KV_LENS), scale=q.shape[2] ** -0.5,
        sliding_window=window, logit_soft_cap=cap, causal=causal,
    )  # fmt: skip
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    return out.cpu()


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return float((out.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (80, 32), (96, 64), (128, 64), (256, 64)])
def test_every_head_dim_matches_fp64_over_a_cached_prefix(head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    batch = build(head_dim, page_size, dtype)
    assert error(attend(*batch), expected(*batch)) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 17, 64, 100])
def test_a_sliding_window_hides_what_lies_behind_it(window: int) -> None:
    batch = build(64, 16, torch.float32)
    assert error(attend(*batch, window=window), expected(*batch, window=window)) < TOLERANCE[torch.float32]


def test_a_soft_cap_bounds_the_scores() -> None:
    q, pages, table = build(64, 16, torch.float32)
    q = q * 20
    capped = attend(q, pages, table, cap=5.0)
    assert error(capped, expected(q, pages, table, cap=5.0)) < 1e-5
    assert error(capped, expected(q, pages, table)) > 0.1


@pytest.mark.parametrize("window", [0, 50])
def test_without_a_causal_mask_a_query_sees_later_keys(window: int) -> None:
    batch = build(64, 64, torch.float32)
    assert error(attend(*batch, causal=False, window=window), expected(*batch, causal=False, window=window)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (2, 2)])
def test_one_kv_head_may_serve_all_heads_or_one(num_heads: int, num_kv_heads: int) -> None:
    batch = build(64, 16, torch.float32, num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert error(attend(*batch), expected(*batch)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("num_heads", "options"),
    [(4, {}), (16, {}), *((8, options) for options in ({}, {"window": 50}, {"cap": 5.0}, {"causal": False}))],
    ids=str,
)
def test_heads_that_share_a_programs_rows_attend_as_heads_of_their_own(num_heads, options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "PACKED_QUERIES", 1000)
    batch = build(64, 16, torch.float32, num_heads=num_heads, num_kv_heads=2)
    assert error(attend(*batch, **options), expected(*batch, **options)) < 1e-5


def test_heads_are_packed_where_queries_are_few_and_a_group_fills_rows_evenly() -> None:
    assert packed_heads(4, 16) == packed_heads(4, 64) == 4
    assert packed_heads(4, 65) == packed_heads(1, 16) == packed_heads(3, 16) == packed_heads(32, 1) == 1


@pytest.mark.parametrize("usual_num_seqs", [None, 1])
def test_rows_of_a_sequence_without_keys_are_nobody_s_and_change_no_other(usual_num_seqs: int | None) -> None:
    """As where another kernel writes them: decode tokens that stand before the chunks. usual_num_seqs changes no result."""
    q, pages, table = build(64, 16, torch.float32)
    others = torch.randn(5, *q.shape[1:])
    bounds = torch.tensor([0, len(others), *Q_LENS, 0]).cumsum(0).int()
    nobody = torch.zeros_like(table[:1])
    out = flash_prefill(
        torch.cat([others, q]).to(DEVICE), pages.to(DEVICE), torch.cat([nobody, table, nobody]).to(DEVICE), bounds.to(DEVICE),
        torch.tensor([0, *KV_LENS, 0], dtype=torch.int32).to(DEVICE), max_seqlen_q=len(others) + len(q), max_kv_len=max(KV_LENS),
        scale=q.shape[2] ** -0.5, usual_num_seqs=usual_num_seqs,
    )  # fmt: skip
    assert error(out[len(others) :].cpu(), expected(q, pages, table)) < TOLERANCE[torch.float32]


def test_no_tokens_give_no_rows() -> None:
    q, pages, table = build(64, 16, torch.float16)
    none = torch.zeros(1, dtype=torch.int32)
    out = flash_prefill(q[:0], pages, table[:0], none, none[:0], max_seqlen_q=0, max_kv_len=0, scale=1.0)
    assert out.shape == (0, 4, 64)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 16, 64])
@pytest.mark.parametrize("shared", [101376, 232448])
def test_a_tile_is_no_longer_than_a_short_run_of_queries_needs(head_dim: int, queries: int, shared: int) -> None:
    tile = tiles(head_dim, queries, 2, shared)
    assert 16 <= tile.block_m < 2 * max(queries, 16)
