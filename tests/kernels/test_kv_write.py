from __future__ import annotations

import math

import pytest
import torch

from halfmoon.kernels.kv_write import kv_write

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 7, 5, 2, 24, 6, 4


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(NUM_TOKENS, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
    q, k, v = qkv.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
    positions = torch.tensor([0, 1, 2, 30, 31, 5, 9])
    slots = torch.randperm(NUM_PAGES * PAGE_SIZE, generator=generator)[:NUM_TOKENS]
    angles = torch.outer(torch.arange(40).double(), 100.0 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM).double())
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    kv_pages = torch.randn(2, NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM, generator=generator).to(dtype)
    weights = torch.randn(2, HEAD_DIM, generator=generator).to(dtype)
    return q, k, v, positions, cos_sin, slots, kv_pages, weights


def naive(x, positions, weight, eps):
    """Rotates pairs (i, i + head_dim / 2) as complex numbers, in fp64, after the norm."""
    x = x.double()
    if weight is not None:
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight.double()
    half = HEAD_DIM // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    angles = torch.tensor([[p * 100.0 ** (-2 * i / HEAD_DIM) for i in range(half)] for p in positions.tolist()], dtype=torch.float64)
    turned = pairs * torch.complex(angles.cos(), angles.sin()).unsqueeze(1)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_q_is_returned_and_k_and_v_stand_in_their_slots_and_nowhere_else(with_norm, dtype, tolerance):
    q, k, v, positions, cos_sin, slots, kv_pages, weights = make(dtype)
    q_norm, k_norm = weights if with_norm else (None, None)
    inputs_before, pages_before = (q.clone(), k.clone(), v.clone()), kv_pages.clone()
    out = kv_write(q, k, v, positions, cos_sin, slots, kv_pages, q_norm=q_norm, k_norm=k_norm, eps=1e-3)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), naive(q, positions, q_norm, 1e-3), atol=tolerance, rtol=tolerance)
    wanted_k = naive(k, positions, k_norm, 1e-3)
    for token, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE_SIZE)
        torch.testing.assert_close(kv_pages[0, page, :, offset].double(), wanted_k[token], atol=tolerance, rtol=tolerance)
        assert torch.equal(kv_pages[1, page, :, offset], v[token])
        pages_before[:, page, :, offset] = kv_pages[:, page, :, offset]
    assert torch.equal(kv_pages, pages_before)
    assert all(torch.equal(now, then) for now, then in zip((q, k, v), inputs_before, strict=True))


def test_attention_scores_depend_on_the_distance_of_positions_alone():
    """What RoPE is for: q at p against k at p - d is the same for every p."""
    q, k, v, _, cos_sin, slots, kv_pages, _ = make()
    scores = []
    for first in (0, 11, 25):
        positions = torch.full((NUM_TOKENS,), first)
        rotated_q = kv_write(q, k, v, positions + 4, cos_sin, slots, kv_pages)
        kv_write(q, k, v, positions, cos_sin, slots, kv_pages)
        page, offset = divmod(int(slots[2]), PAGE_SIZE)
        scores.append(float(rotated_q[2, 0] @ kv_pages[0, page, 0, offset]))
    assert all(math.isclose(score, scores[0], rel_tol=1e-4) for score in scores)
