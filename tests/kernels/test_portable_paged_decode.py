"""The Triton decode kernel: in the interpreter where there is no GPU, on the GPU else."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.portable import paged_decode as module  # noqa: E402
from halfmoon.kernels.portable.paged_decode import fp8_tiles, paged_decode, sums_lazily  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * CUDA
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def build(lens: Sequence[int], head_dim: int, page_size: int, dtype: torch.dtype, num_heads: int = 4, num_kv_heads: int = 2):
    """q, pages, table; what lies in the pages behind a sequence's last key is NaN."""
    torch.manual_seed(sum(lens) + head_dim)
    each = max(1, -(-max(lens) // page_size))
    pages = torch.randn(2, each * len(lens) + 1, num_kv_heads, page_size, head_dim).to(dtype)
    table = torch.randperm(pages.shape[1] - 1, dtype=torch.int32).view(len(lens), each) + 1
    for row, kv_len in zip(table.long(), lens, strict=True):
        pages[:, row[kv_len // page_size :][:1], :, kv_len % page_size :] = math.nan
        pages[:, row[kv_len // page_size + 1 :]] = math.nan
    return torch.randn(len(lens), num_heads, head_dim).to(dtype), pages, table


def expected(q, pages, table, lens: Sequence[int], window: int = 0, cap: float = 0.0) -> torch.Tensor:
    out, group = torch.zeros(q.shape, dtype=torch.float64), q.shape[1] // pages.shape[2]
    for s, kv_len in enumerate(lens):
        keys = range(max(0, kv_len - window) if window else 0, kv_len)
        for head in range(q.shape[1]):
            k, v = (
                torch.stack([x[table[s, t // x.shape[2]], head // group, t % x.shape[2]] for t in keys]).double() if kv_len else None
                for x in pages
            )  # fmt: skip
            if k is not None and v is not None:
                scores = k @ q[s, head].double() * q.shape[2] ** -0.5
                out[s, head] = (cap * torch.tanh(scores / cap) if cap else scores).softmax(0) @ v
    return out


def attend(q, pages, table, lens: Sequence[int], window: int = 0, cap: float = 0.0, max_kv_len: int = 0) -> torch.Tensor:
    out = paged_decode(
        q.to(DEVICE), pages.to(DEVICE), table.to(DEVICE), torch.tensor(lens, dtype=torch.int32).to(DEVICE),
        max_kv_len=max_kv_len or max(lens), scale=q.shape[2] ** -0.5, sliding_window=window, logit_soft_cap=cap,
    )  # fmt: skip
    assert out.shape == q.shape and out.dtype == q.dtype and torch.isfinite(out).all()
    return out.cpu()


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (80, 32), (96, 64), (128, 64), (256, 64)])
def test_every_head_dim_matches_fp64(head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    lens = (70, 200, 1)
    batch = build(lens, head_dim, page_size, dtype)
    assert error(attend(*batch, lens), expected(*batch, lens)) < TOLERANCE[dtype]


@settings(max_examples=8)
@given(lens=st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any), surplus=st.integers(0, 300))
def test_any_lengths_are_shared_out_whole_and_padding_rows_are_zero(lens: list[int], surplus: int) -> None:
    batch = build(lens, 64, 16, torch.float32)
    out = attend(*batch, lens, max_kv_len=max(lens) + surplus)
    assert error(out, expected(*batch, lens)) < TOLERANCE[torch.float32]
    assert all(out[s].eq(0).all() for s, kv_len in enumerate(lens) if kv_len == 0)


@settings(max_examples=6)
@given(lens=st.lists(st.integers(0, 90), min_size=1, max_size=3).filter(any), num_q=st.sampled_from([1, 3]))
def test_written_into_rows_of_another_s_result_it_leaves_those_of_sequences_without_keys(lens: list[int], num_q: int) -> None:
    q, pages, table = build(lens, 64, 16, torch.float32)
    if num_q > 1:
        q = torch.randn(len(lens), num_q, *q.shape[1:])
    arguments = (q.to(DEVICE), pages.to(DEVICE), table.to(DEVICE), torch.tensor(lens, dtype=torch.int32).to(DEVICE))
    options = {"max_kv_len": max(lens), "scale": 0.1}
    rows = torch.full((len(lens) + 2, *q.shape[1:]), 7.0, device=DEVICE)
    assert paged_decode(*arguments, **options, out=rows[: len(lens)]).data_ptr() == rows.data_ptr()
    wanted = paged_decode(*arguments, **options)
    for row, kv_len in enumerate([*lens, 0, 0]):
        assert torch.equal(rows[row], wanted[row]) if kv_len else (rows[row] == 7.0).all()


@pytest.mark.parametrize("window", [1, 31, 64, 100])
def test_a_sliding_window_sees_the_last_keys_only(window: int) -> None:
    lens = (150, 20, 64)
    batch = build(lens, 64, 16, torch.float32)
    assert error(attend(*batch, lens, window=window), expected(*batch, lens, window=window)) < TOLERANCE[torch.float32]


def test_a_soft_cap_bounds_the_scores() -> None:
    lens = (90, 33)
    q, pages, table = build(lens, 64, 16, torch.float32)
    assert error(attend(q * 20, pages, table, lens, cap=5.0), expected(q * 20, pages, table, lens, cap=5.0)) < 1e-5


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (32, 1), (3, 3)])
def test_any_group_of_query_heads_shares_a_kv_head(num_heads: int, num_kv_heads: int) -> None:
    lens = (75, 10)
    batch = build(lens, 64, 16, torch.float32, num_heads, num_kv_heads)
    assert error(attend(*batch, lens), expected(*batch, lens)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"cap": 5.0}], ids=str)
def test_sums_that_threads_keep_for_themselves_are_the_rows_sums(options, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = [(37 * s) % 90 for s in range(16)]
    assert sums_lazily(128, 16, 1, 2 * len(lens), False) and not sums_lazily(128, 16, 1, 2 * len(lens) - 2, False)
    batch = build(lens, 128, 16, torch.float32)
    lazily = attend(*batch, lens, **options)
    assert error(lazily, expected(*batch, lens, **options)) < 1e-5
    monkeypatch.setattr(module, "MANY_PAIRS", 1000)
    assert error(lazily, attend(*batch, lens, **options).double()) < 1e-5


def test_the_counters_are_left_as_they_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, counters = (150, 20, 64), torch.zeros(16, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(module, "zeroed_counters", lambda device, count: counters)
    batch = build(lens, 64, 16, torch.float32)
    for _ in range(2):
        assert error(attend(*batch, lens), expected(*batch, lens)) < TOLERANCE[torch.float32]
        assert counters.eq(0).all()


def test_no_sequences_give_no_rows() -> None:
    q, pages, table = build((5,), 64, 16, torch.float16)
    out = paged_decode(q[:0], pages, table[:0], torch.zeros(0, dtype=torch.int32), max_kv_len=0, scale=1.0)
    assert out.shape == (0, 4, 64)


def expected_of_several(q, pages, table, lens: Sequence[int], **options) -> torch.Tensor:
    """Query token i of n is the last one of a sequence that is n - 1 - i tokens shorter."""
    num_q = q.shape[1]
    return torch.stack(
        [expected(q[:, i], pages, table, [max(0, n - (num_q - 1 - i)) for n in lens], **options) for i in range(num_q)], dim=1
    )


@pytest.mark.parametrize(("num_q", "num_heads"), [(2, 4), (5, 6), (9, 8)])  # the last are more rows than one launch takes
@pytest.mark.parametrize("window", [0, 40])
def test_several_query_tokens_see_no_later_ones(num_q: int, num_heads: int, window: int) -> None:
    lens = (70, 130, 0, 3)
    _, pages, table = build(lens, 64, 16, torch.float32)
    wide = torch.randn(len(lens), num_q, num_heads + 2, 64)
    q = wide[:, :, :num_heads].to(DEVICE)
    out = paged_decode(
        q, pages.to(DEVICE), table.to(DEVICE), torch.tensor(lens, dtype=torch.int32).to(DEVICE), max_kv_len=130, scale=0.125,
        sliding_window=window,
    )  # fmt: skip
    assert out.shape == q.shape and out.is_contiguous() and torch.isfinite(out).all()
    assert error(out.cpu(), expected_of_several(q.cpu(), pages, table, lens, window=window)) < TOLERANCE[torch.float32]
    assert out[2].eq(0).all() and out[3, : max(0, num_q - 3)].eq(0).all()


HOPPER, AMPERE = 232448, 166912  # bytes of shared memory that a program may take


@pytest.mark.parametrize(
    ("call", "programs_per_sm"),
    [
        ((128, 16, 1, 64, HOPPER), 3),
        ((64, 16, 1, 512, HOPPER), 3),
        ((128, 16, 1, 8, HOPPER), 2),  # one sequence
        ((128, 16, 1, 64, AMPERE), 2),
        ((128, 16, 4, 64, HOPPER), 2),  # more registers than a third of an SM's
        ((128, 32, 1, 64, HOPPER), 2),
        ((256, 16, 1, 64, HOPPER), 2),
    ],
    ids=str,
)
def test_a_third_program_over_fp8_comes_where_there_is_work_and_room_for_it(call: tuple, programs_per_sm: int) -> None:
    assert fp8_tiles(*call).programs_per_sm == programs_per_sm


def test_a_head_that_no_register_file_holds_is_refused() -> None:
    q, pages = torch.zeros(1, 2, 320), torch.zeros(2, 1, 2, 16, 320)
    with pytest.raises(ValueError, match="head_dim 320"):
        paged_decode(q, pages, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), max_kv_len=1, scale=1.0)
