from __future__ import annotations

import math

import pytest
import torch

from halfmoon.kernels.silu_mul import silu_mul


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_gate_comes_first_and_equals_the_formula(dtype, tolerance):
    torch.manual_seed(0)
    gate_up = (torch.randn(3, 2 * 37) * 4).to(dtype)
    out = silu_mul(gate_up)
    assert out.shape == (3, 37) and out.dtype == dtype
    for row in range(3):
        for column in range(37):
            gate, up = float(gate_up[row, column]), float(gate_up[row, 37 + column])
            wanted = gate / (1 + math.exp(-gate)) * up
            assert math.isclose(float(out[row, column]), wanted, rel_tol=tolerance, abs_tol=tolerance)
