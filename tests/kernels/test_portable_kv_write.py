"""The Triton QK-norm, RoPE and page write: in the interpreter where there is no GPU, on the GPU else."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.portable.kv_write import kv_write  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-5
POSITIONS = (5, 0, 63, 17, 17)
SLOTS = (0, 37, 31, -1, 16)


def rope(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """[tokens, heads, head_dim] by complex numbers: column i and i + head_dim/2 are one of them, turned by position · 10000^(-2i/d)."""
    x = x.double()
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    half = x.shape[2] // 2
    angle = torch.tensor(POSITIONS).double()[:, None, None] * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def table(head_dim: int) -> torch.Tensor:
    angle = torch.arange(64).double()[:, None] * 10000.0 ** (-torch.arange(head_dim // 2).double() / (head_dim // 2))
    return torch.cat((angle.cos(), angle.sin()), 1).float()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), [(64, 4, 2), (80, 6, 3), (128, 8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_queries_are_rotated_and_keys_and_values_reach_their_slots(
    dtype, head_dim: int, num_heads: int, num_kv_heads: int, norm: bool
) -> None:
    torch.manual_seed(head_dim)
    fused = torch.randn(len(SLOTS), num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    q, k, v = fused.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    weights = [torch.rand(head_dim).to(dtype) + 0.5 for _ in range(2)] if norm else [None, None]
    pages = torch.full((2, 3, num_kv_heads, 16, head_dim), 7.0, dtype=dtype, device=DEVICE)
    q_out = kv_write(
        *(x.to(DEVICE).as_strided(x.shape, x.stride()) if not CUDA else x.to(DEVICE) for x in (q, k, v)),
        torch.tensor(POSITIONS, device=DEVICE), table(head_dim).to(DEVICE), torch.tensor(SLOTS, device=DEVICE), pages,
        q_norm=weights[0].to(DEVICE) if norm else None, k_norm=weights[1].to(DEVICE) if norm else None, eps=EPS,
    )  # fmt: skip
    tolerance = 3e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(q_out.cpu().double(), rope(q, weights[0]), rtol=tolerance, atol=tolerance)
    want = torch.full(pages.shape, 7.0, dtype=torch.float64)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            want[0, slot // 16, :, slot % 16] = rope(k, weights[1])[token]
            want[1, slot // 16, :, slot % 16] = v[token].double()
    torch.testing.assert_close(pages.cpu().double(), want, rtol=tolerance, atol=tolerance)


def test_no_tokens_write_nothing() -> None:
    pages, none = torch.zeros(2, 1, 2, 16, 64), torch.zeros(0, dtype=torch.int64)
    assert kv_write(torch.zeros(0, 4, 64), *[torch.zeros(0, 2, 64)] * 2, none, table(64), none, pages).shape == (0, 4, 64)
    assert pages.eq(0).all()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scales"])
def test_fp8_pages_hold_the_nearest_number_of_value_by_scale(scaled: bool) -> None:
    torch.manual_seed(3)
    heads, kv_heads, head_dim = 2, 2, 64
    fused = torch.randn(len(SLOTS), heads + 2 * kv_heads, head_dim) * 10.0 ** torch.randint(-4, 4, (len(SLOTS), 1, 1))
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    scales = torch.tensor([[0.5, 2.0], [0.125, 3.0]]) if scaled else None
    still = torch.zeros(64, head_dim)
    still[:, : head_dim // 2] = 1.0  # a rotation by nothing, so that rounding is all that happens to keys
    pages = torch.zeros(2, 3, kv_heads, 16, head_dim).to(torch.float8_e4m3fn).to(DEVICE)
    kv_write(
        q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), torch.tensor(POSITIONS, device=DEVICE), still.to(DEVICE),
        torch.tensor(SLOTS, device=DEVICE), pages, kv_scales=scales.to(DEVICE) if scales is not None else None,
    )  # fmt: skip
    want = torch.zeros(pages.shape)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            for side, x in enumerate((k, v)):
                scaled_x = x[token] / scales[side][:, None] if scales is not None else x[token]
                want[side, slot // 16, :, slot % 16] = scaled_x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    # a quotient that lies on the edge between two numbers may fall on either side; ours is the nearest all the same
    assert (pages.cpu().float() != want).sum() <= (2 if scaled else 0)
    torch.testing.assert_close(pages.cpu().float(), want, rtol=0.13, atol=2.0**-9)
