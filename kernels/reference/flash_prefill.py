"""Attention over paged KV in torch: the pages of a sequence are gathered, then dense attention sequence by sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .fp8 import take_pages

SPARSE_BLOCK = 64


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
    kv_scales: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    usual_num_seqs: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See kernels/flash_prefill.py. Computed in fp32, rounded once."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
    bounds = cu_seqlens_q.tolist()
    for index, kv_len in enumerate(kv_lens.tolist()):
        first, last = bounds[index], bounds[index + 1]
        if first == last or kv_len == 0:
            continue
        k, v = _gather(kv_pages, block_table[index], kv_len, kv_scales)
        queries = q[first:last].float().transpose(0, 1)
        mask = _mask(last - first, kv_len, sliding_window, causal, q.device)
        if block_mask is not None:
            mask = _with_blocks(mask, block_mask[index], last - first, kv_len)
        if return_lse or block_mask is not None or logit_soft_cap != 0.0:
            attended, sums = _attend_in_steps(queries, k, v, mask, scale, logit_soft_cap)
            lse[first:last] = sums.transpose(0, 1)
        else:
            grouped = queries.shape[0] > k.shape[0]
            attended = F.scaled_dot_product_attention(queries[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=grouped)[0]
        out[first:last] = attended.transpose(0, 1).to(q.dtype)
    return (out, lse) if return_lse else out


def _gather(kv_pages: torch.Tensor, pages: torch.Tensor, kv_len: int, kv_scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, fp32 [num_kv_heads, kv_len, head_dim]."""
    _, _, num_kv_heads, page_size, head_dim = kv_pages.shape
    num_pages = -(-kv_len // page_size)
    dense = take_pages(kv_pages, pages[:num_pages], kv_scales).transpose(1, 2).reshape(2, num_kv_heads, -1, head_dim)
    k, v = dense[:, :, :kv_len].unbind(0)
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


def _with_blocks(mask: torch.Tensor | None, blocks: torch.Tensor, num_queries: int, kv_len: int) -> torch.Tensor:
    """bool [heads or 1, num_queries, kv_len] from a mask of blocks [heads or 1, query blocks, key blocks]."""
    cells = blocks.repeat_interleave(SPARSE_BLOCK, 1)[:, :num_queries].repeat_interleave(SPARSE_BLOCK, 2)[:, :, :kv_len]
    return cells if mask is None else cells & mask


def _attend_in_steps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, logit_soft_cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [num_heads, num_queries, head_dim] against k, v [num_kv_heads, kv_len, head_dim]; out like q, and the log of the weights' sum
    [num_heads, num_queries]. A query that sees nothing gets zeros and -inf."""
    groups = q.shape[0] // k.shape[0]
    scores = q @ k.repeat_interleave(groups, dim=0).transpose(1, 2) * scale
    if logit_soft_cap != 0.0:
        scores = logit_soft_cap * torch.tanh(scores / logit_soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).nan_to_num(0.0) @ v.repeat_interleave(groups, dim=0), scores.logsumexp(dim=-1)
