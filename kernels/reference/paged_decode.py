"""Decode attention over paged KV in torch: all sequences in one go, padded to the longest."""

from __future__ import annotations

import torch


def paged_decode(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    max_kv_len: int,
    scale: float,
    sliding_window: int = 0,
    logit_soft_cap: float = 0.0,
) -> torch.Tensor:
    """See kernels/paged_decode.py. Computed in fp32, rounded once. Pages must hold finite numbers, the unused ones too."""
    num_seqs, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, _ = kv_pages.shape
    num_pages = -(-max_kv_len // page_size)
    if num_pages == 0:
        return torch.zeros_like(q)
    pages = block_table[:, :num_pages].reshape(-1)
    dense = kv_pages.index_select(1, pages).float().view(2, num_seqs, num_pages, num_kv_heads, page_size, head_dim)
    k, v = dense.transpose(2, 3).reshape(2, num_seqs * num_kv_heads, num_pages * page_size, head_dim).unbind(0)
    # the query heads that share a KV head are the rows of one matrix product
    queries = q.float().view(num_seqs * num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.bmm(queries, k.transpose(1, 2)).view(num_seqs, num_heads, -1) * scale
    if logit_soft_cap != 0.0:
        scores = logit_soft_cap * torch.tanh(scores / logit_soft_cap)
    key = torch.arange(num_pages * page_size, device=q.device)
    ends = kv_lens.view(num_seqs, 1, 1)
    unseen = key >= ends if sliding_window == 0 else (key >= ends) | (key < ends - sliding_window)
    weights = scores.masked_fill_(unseen, float("-inf")).softmax(dim=-1)
    out = torch.bmm(weights.view(num_seqs * num_kv_heads, -1, num_pages * page_size), v).view(num_seqs, num_heads, head_dim)
    return out.masked_fill_(ends == 0, 0.0).to(q.dtype)
