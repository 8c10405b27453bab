from __future__ import annotations

import pytest
import torch

from halfmoon.kernels.flash_prefill import flash_prefill

SHAPES = [  # q_lens, kv_lens, (heads, kv heads), head_dim, page_size
    ([5], [5], (1, 1), 16, 4),
    ([1, 7, 3], [1, 7, 3], (6, 2), 40, 8),
    ([3, 1, 11, 2], [20, 33, 11, 64], (5, 5), 24, 7),
    ([4, 9], [131, 9], (8, 1), 64, 64),
]
DTYPES = [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]


def run(inputs, **options):
    return flash_prefill(
        inputs.q,
        inputs.kv_pages,
        inputs.block_table,
        inputs.cu_seqlens_q,
        inputs.kv_lens,
        max_seqlen_q=inputs.max_seqlen_q,
        max_kv_len=inputs.max_kv_len,
        **options,
    )


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_over_pages_equal_dense_attention(shape, dtype, atol, paged, naive_attention):
    inputs = paged(*shape, dtype)
    out = run(inputs, scale=0.2)
    assert out.dtype == dtype and out.shape == inputs.q.shape
    torch.testing.assert_close(out.double(), naive_attention(inputs, 0.2), atol=atol, rtol=atol)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 2, 9, 20, 500])
def test_window_and_soft_cap_equal_dense_attention(window, soft_cap, causal, paged, naive_attention):
    inputs = paged(*SHAPES[2], torch.float32)
    options = {"scale": 0.3, "sliding_window": window, "logit_soft_cap": soft_cap, "causal": causal}
    torch.testing.assert_close(run(inputs, **options).double(), naive_attention(inputs, **options), atol=2e-6, rtol=2e-6)


def test_a_sequence_without_queries_takes_no_rows(paged, naive_attention):
    inputs = paged([2, 0, 3], [9, 5, 3], (4, 2), 16, 4, torch.float32)
    torch.testing.assert_close(run(inputs, scale=0.25).double(), naive_attention(inputs, 0.25), atol=2e-6, rtol=2e-6)
