"""Attention over paged KV in torch: the pages of a sequence are gathered, then dense attention sequence by sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def flash_prefill(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_kv_len: int,
    scale: float,
    sliding_window: int = 0,
    logit_soft_cap: float = 0.0,
    causal: bool = True,
) -> torch.Tensor:
    """See kernels/flash_prefill.py. Computed in fp32, rounded once."""
    out = torch.zeros_like(q)
    bounds = cu_seqlens_q.tolist()
    for index, kv_len in enumerate(kv_lens.tolist()):
        first, last = bounds[index], bounds[index + 1]
        if first == last or kv_len == 0:
            continue
        k, v = _gather(kv_pages, block_table[index], kv_len)
        queries = q[first:last].float().transpose(0, 1)
        mask = _mask(last - first, kv_len, sliding_window, causal, q.device)
        out[first:last] = _attend(queries, k, v, mask, scale, logit_soft_cap).transpose(0, 1).to(q.dtype)
    return out


def _gather(kv_pages: torch.Tensor, pages: torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, fp32 [num_kv_heads, kv_len, head_dim]."""
    _, _, num_kv_heads, page_size, head_dim = kv_pages.shape
    num_pages = -(-kv_len // page_size)
    dense = kv_pages.index_select(1, pages[:num_pages]).transpose(1, 2).reshape(2, num_kv_heads, -1, head_dim)
    k, v = dense[:, :, :kv_len].float().unbind(0)
    return k, v


def _mask(num_queries: int, kv_len: int, sliding_window: int, causal: bool, device: torch.device) -> torch.Tensor | None:
    """bool [num_queries, kv_len], True where a query sees a key; None: sees all."""
    sees_all_before = sliding_window == 0 or kv_len <= sliding_window
    if sees_all_before and (not causal or num_queries == 1):
        return None
    query = torch.arange(kv_len - num_queries, kv_len, device=device).unsqueeze(1)
    key = torch.arange(kv_len, device=device).unsqueeze(0)
    seen = key <= query if causal else torch.ones(num_queries, kv_len, dtype=torch.bool, device=device)
    return seen if sees_all_before else seen & (key > query - sliding_window)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, logit_soft_cap: float
) -> torch.Tensor:
    """q [num_heads, num_queries, head_dim] against k, v [num_kv_heads, kv_len, head_dim]; out like q."""
    groups = q.shape[0] // k.shape[0]
    if logit_soft_cap == 0.0:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=groups > 1)[0]
    scores = q @ k.repeat_interleave(groups, dim=0).transpose(1, 2) * scale
    scores = logit_soft_cap * torch.tanh(scores / logit_soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v.repeat_interleave(groups, dim=0)
