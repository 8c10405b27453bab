"""Between the QKV projection and attention, in one pass: optional per-head RMS norm of q and k, rotary embedding, K and V into pages.

q ─► norm ─► rotate ─► q_out
k ─► norm ─► rotate ─► kv_pages[0, page, head, offset]      page, offset = divmod(slot_mapping[token], page_size)
v ───────────────────► kv_pages[1, page, head, offset]

One program a token and side (side 0 takes the query heads, side 1 the key and value heads).
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import early_launch
from .fp8 import narrowed, readable


@triton.jit
def _rotated(
    in_ptr, norm_ptr, cos, sin, heads, half_columns, num_heads, stride_head, eps,
    HALF: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Both halves [heads, HALF] of a token's heads after norm and rotation, in fp32."""
    inside = (heads < num_heads)[:, None] & (half_columns < HALF)[None, :]
    at = in_ptr + heads[:, None] * stride_head + half_columns[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        known = half_columns < HALF
        low = low * scale * tl.load(norm_ptr + half_columns, mask=known, other=0.0).to(tl.float32)[None, :]
        high = high * scale * tl.load(norm_ptr + HALF + half_columns, mask=known, other=0.0).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _write_query(
    in_ptr, out_ptr, norm_ptr, cos, sin, columns, num_heads, stride_head, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, BLOCK)
    low, high = _rotated(in_ptr, norm_ptr, cos, sin, heads, columns, num_heads, stride_head, eps, HALF, HAS_NORM)
    inside = (heads < num_heads)[:, None] & (columns < HALF)[None, :]
    to = out_ptr + heads[:, None] * (2 * HALF) + columns[None, :]
    tl.store(to, low.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(to + HALF, high.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _stored(x, scales_ptr, heads, num_heads, element: tl.constexpr):
    """[heads, columns] as the cache holds it; uint8 pages hold e4m3."""
    if element == tl.uint8:
        x = x.to(tl.float32)
        if scales_ptr is not None:
            x = x / tl.load(scales_ptr + heads, mask=heads < num_heads, other=1.0)[:, None]
        x = narrowed(x)
    return x.to(element)


@triton.jit
def _write_page(
    k_ptr, v_ptr, page_ptr, norm_ptr, scales_ptr, cos, sin, columns,
    num_heads, stride_k_head, stride_v_head, stride_kv, page_size, offset, wanted, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    element: tl.constexpr = page_ptr.dtype.element_ty
    heads = tl.arange(0, BLOCK)
    low, high = _rotated(k_ptr, norm_ptr, cos, sin, heads, columns, num_heads, stride_k_head, eps, HALF, HAS_NORM)
    inside = (heads < num_heads)[:, None] & (columns < HALF)[None, :] & wanted
    to = page_ptr + (heads[:, None] * page_size + offset) * (2 * HALF) + columns[None, :]
    tl.store(to, _stored(low, scales_ptr, heads, num_heads, element), mask=inside)
    tl.store(to + HALF, _stored(high, scales_ptr, heads, num_heads, element), mask=inside)
    at = v_ptr + heads[:, None] * stride_v_head + columns[None, :]
    v_scales_ptr = None
    if scales_ptr is not None:
        v_scales_ptr = scales_ptr + num_heads
    tl.store(to + stride_kv, _stored(tl.load(at, mask=inside, other=0.0), v_scales_ptr, heads, num_heads, element), mask=inside)
    tl.store(
        to + stride_kv + HALF, _stored(tl.load(at + HALF, mask=inside, other=0.0), v_scales_ptr, heads, num_heads, element), mask=inside
    )


@triton.jit
def _kv_write_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, cos_sin_ptr, slot_mapping_ptr, kv_pages_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, scales_ptr,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head, stride_kv, stride_page,
    num_heads, num_kv_heads, page_size, eps,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HALF_BLOCK)
    known = columns < HALF
    position = tl.load(positions_ptr + token).to(tl.int64)
    angles = cos_sin_ptr + position * (2 * HALF) + columns
    cos = tl.load(angles, mask=known, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=known, other=0.0)[None, :]
    if tl.program_id(1) == 0:
        _write_query(
            q_ptr + token * stride_q, q_out_ptr + token * num_heads * (2 * HALF), q_norm_ptr, cos, sin, columns,
            num_heads, stride_q_head, eps, HALF, Q_BLOCK, HAS_Q_NORM,
        )  # fmt: skip
    else:
        slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
        _write_page(
            k_ptr + token * stride_k, v_ptr + token * stride_v, kv_pages_ptr + slot // page_size * stride_page, k_norm_ptr,
            scales_ptr, cos, sin, columns,
            num_kv_heads, stride_k_head, stride_v_head, stride_kv, page_size, slot % page_size, slot >= 0, eps, HALF, KV_BLOCK, HAS_K_NORM,
        )  # fmt: skip


def kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_pages: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] (views of one fused projection are fine);
    positions and slot_mapping int [num_tokens], a slot is page · page_size + offset, a negative one writes nothing (padding);
    cos_sin fp32 [max_position, head_dim], the cosines of the head_dim/2 angles, then their sines;
    kv_pages [2, num_pages, num_kv_heads, page_size, head_dim], written in place, as value / kv_scales where they are float8_e4m3fn
    (fp32 [2, num_kv_heads], contiguous; None: 1); q_norm, k_norm [head_dim].
    Returns the rotated queries, contiguous. Rotation pairs column i with i + head_dim/2 (Hugging Face's half split).
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[2], kv_pages.shape[3]
    q_out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return q_out
    half = head_dim // 2
    kv_pages, fp8 = readable(kv_pages)
    _kv_write_kernel[(num_tokens, 2)](
        q, k, v, positions, cos_sin, slot_mapping, kv_pages,
        q_norm if q_norm is not None else q, k_norm if k_norm is not None else k, q_out, kv_scales if fp8 else None,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), kv_pages.stride(0), kv_pages.stride(1),
        num_heads, num_kv_heads, page_size, eps,
        HALF=half, HALF_BLOCK=triton.next_power_of_2(half), Q_BLOCK=triton.next_power_of_2(num_heads),
        KV_BLOCK=triton.next_power_of_2(num_kv_heads), HAS_Q_NORM=q_norm is not None, HAS_K_NORM=k_norm is not None, num_warps=4,
        **early_launch(q.device),
    )  # fmt: skip
    return q_out
