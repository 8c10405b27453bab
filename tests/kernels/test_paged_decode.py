from __future__ import annotations

import pytest
import torch

from halfmoon.kernels.paged_decode import paged_decode

SHAPES = [  # kv_lens, (heads, kv heads), head_dim, page_size
    ([1], (1, 1), 16, 4),
    ([1, 8, 9, 33], (6, 2), 40, 8),
    ([20, 33, 7], (5, 5), 24, 7),
    ([131, 64, 65], (8, 1), 64, 64),
]
DTYPES = [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]


def run(inputs, **options):
    return paged_decode(inputs.q, inputs.kv_pages, inputs.block_table, inputs.kv_lens, max_kv_len=inputs.max_kv_len, **options)


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_a_sequence_equals_dense_attention(shape, dtype, atol, paged, naive_attention):
    inputs = paged([1] * len(shape[0]), *shape, dtype)
    out = run(inputs, scale=0.2)
    assert out.dtype == dtype and out.shape == inputs.q.shape
    torch.testing.assert_close(out.double(), naive_attention(inputs, 0.2), atol=atol, rtol=atol)


@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 2, 9, 20, 500])
def test_window_and_soft_cap_equal_dense_attention(window, soft_cap, paged, naive_attention):
    inputs = paged([1, 1, 1], *SHAPES[2], torch.float32)
    options = {"scale": 0.3, "sliding_window": window, "logit_soft_cap": soft_cap}
    torch.testing.assert_close(run(inputs, **options).double(), naive_attention(inputs, **options), atol=2e-6, rtol=2e-6)


def test_a_padding_row_gives_zeros_and_changes_no_other(paged, naive_attention):
    inputs = paged([1, 1, 1], [5, 0, 9], (4, 2), 16, 4, torch.float32)
    out = run(inputs, scale=0.25)
    assert not out[1].any()
    alone = paged([1], [5], (4, 2), 16, 4, torch.float32)
    alone = type(alone)(inputs.q[:1], inputs.kv_pages, inputs.block_table[:1], alone.cu_seqlens_q, alone.kv_lens, 1, 5, inputs.dense[:1])
    torch.testing.assert_close(out[:1].double(), naive_attention(alone, 0.25), atol=2e-6, rtol=2e-6)


def test_a_batch_of_padding_alone_gives_zeros(paged):
    inputs = paged([1, 1], [0, 0], (4, 2), 16, 4, torch.float32)
    assert not run(inputs, scale=0.25).any()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9, "logit_soft_cap": 3.0}], ids=str)
def test_several_query_tokens_are_a_chunk_at_the_end(options, paged, naive_attention):
    inputs = paged([3, 3, 3], *SHAPES[2], torch.float32)
    q = inputs.q.view(3, 3, *inputs.q.shape[1:])
    out = paged_decode(q, inputs.kv_pages, inputs.block_table, inputs.kv_lens, max_kv_len=inputs.max_kv_len, scale=0.3, **options)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double().view(inputs.q.shape), naive_attention(inputs, 0.3, **options), atol=2e-6, rtol=2e-6)


def test_tokens_before_a_sequences_first_give_zeros(paged):
    inputs = paged([1], [2], (4, 2), 16, 4, torch.float32)
    q = torch.randn(1, 4, 4, 16)
    out = paged_decode(q, inputs.kv_pages, inputs.block_table, inputs.kv_lens, max_kv_len=2, scale=0.25)
    assert not out[:, :2].any() and out[:, 2:].any(dim=-1).all()


def test_written_into_another_s_result_rows_of_padding_stay_as_they_are(paged):
    inputs = paged([1, 1, 1], [7, 0, 5], (4, 2), 16, 4, torch.float32)
    wanted, rows = run(inputs, scale=0.25), torch.full_like(inputs.q, 9.0)
    assert run(inputs, scale=0.25, out=rows) is rows
    assert torch.equal(rows[[0, 2]], wanted[[0, 2]]) and (rows[1] == 9.0).all()
