"""The Triton kernels over rows, rms_norm and silu_mul: in the interpreter where there is no GPU, on the GPU else."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.portable.rms_norm import rms_norm  # noqa: E402
from halfmoon.kernels.portable.silu_mul import silu_mul  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
CASES = [(torch.float32, 1e-5), (torch.float16, 3e-3)]


@pytest.mark.parametrize(("dtype", "tolerance"), CASES, ids=str)
@pytest.mark.parametrize("hidden", [64, 100, 2048])
def test_a_row_is_divided_by_its_root_mean_square(hidden: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(hidden)
    wide = torch.randn(3, hidden + 8).to(dtype)
    x, weight = wide[:, :hidden], torch.randn(hidden).to(dtype)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES, ids=str)
def test_a_residual_is_added_before_the_norm_and_returned(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    x, residual, weight = torch.randn(4, 96).to(dtype), torch.randn(4, 96).to(dtype), torch.randn(96).to(dtype)
    before = residual.clone()
    out, new_residual = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, residual.to(DEVICE))
    total = x.double() + residual.double()
    torch.testing.assert_close(new_residual.cpu().double(), total, rtol=tolerance, atol=tolerance)
    want = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(residual, before)


def test_the_norm_sees_the_residual_as_it_is_rounded() -> None:
    torch.manual_seed(2)
    x, residual = torch.randn(8, 512).half(), torch.randn(8, 512).half() * 3
    out, total = rms_norm(x.to(DEVICE), torch.ones(512, dtype=torch.float16, device=DEVICE), 1e-5, residual.to(DEVICE))
    seen = (x + residual).float()
    want = (seen * (seen.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).half()
    assert torch.equal(total.cpu(), x + residual)
    assert (out.cpu() == want).float().mean() > 0.98  # a rounding here and there; unrounded sums would move a tenth of the values and more


def test_a_row_too_long_for_registers_is_refused() -> None:
    with pytest.raises(ValueError, match="65537"):
        rms_norm(torch.zeros(1, 65537), torch.zeros(65537), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES, ids=str)
@pytest.mark.parametrize("intermediate", [8, 100, 1500])
def test_silu_of_the_gate_scales_the_other_half(intermediate: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(intermediate)
    gate_up = torch.randn(2, 3, 2 * intermediate).to(dtype) * 3
    gate, up = gate_up.double().split(intermediate, -1)
    torch.testing.assert_close(silu_mul(gate_up.to(DEVICE)).cpu().double(), gate * gate.sigmoid() * up, rtol=tolerance, atol=tolerance)


def test_halves_that_are_not_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        silu_mul(torch.zeros(1, 7))
