from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmoon.kernels.rms_norm import rms_norm

DTYPES = [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]


def naive(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    values = x.double().numpy()
    return torch.from_numpy(values / np.sqrt((values**2).mean(-1, keepdims=True) + eps) * weight.double().numpy())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 123), (3, 4, 64)])
def test_equals_the_formula(shape, dtype, tolerance):
    torch.manual_seed(1)
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    out = rms_norm(x, weight, 1e-2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), naive(x, weight, 1e-2), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_residual_is_added_before_and_the_sum_returned(dtype, tolerance):
    torch.manual_seed(2)
    x, residual, weight = torch.randn(5, 77).to(dtype), torch.randn(5, 77).to(dtype), torch.randn(77).to(dtype)
    out, total = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out.double(), naive(total, weight, 1e-5), atol=tolerance, rtol=tolerance)


def test_large_half_precision_values_do_not_overflow():
    x = torch.full((1, 64), 3e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-5), torch.ones(1, 64, dtype=torch.float16))
