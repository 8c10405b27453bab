"""Decode attention over paged KV in torch: all sequences in one go, padded to the longest."""

from __future__ import annotations

import torch

from .fp8 import take_pages


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
    kv_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See kernels/paged_decode.py. Computed in fp32, rounded once."""
    num_seqs, head_dim = q.shape[0], q.shape[-1]
    num_q = q.shape[1] if q.dim() == 4 else 1
    _, _, num_kv_heads, page_size, _ = kv_pages.shape
    num_pages = -(-max_kv_len // page_size)
    if num_pages == 0:
        return torch.zeros_like(q) if out is None else out
    pages = block_table[:, :num_pages].reshape(-1)
    dense = take_pages(kv_pages, pages, kv_scales).view(2, num_seqs, num_pages, num_kv_heads, page_size, head_dim)
    k, v = dense.transpose(2, 3).reshape(2, num_seqs * num_kv_heads, num_pages * page_size, head_dim).unbind(0)
    # the query heads that share a KV head are the rows of one matrix product, those of all query tokens
    queries = q.float().view(num_seqs, num_q, num_kv_heads, -1, head_dim).transpose(1, 2).reshape(num_seqs * num_kv_heads, -1, head_dim)
    scores = torch.bmm(queries, k.transpose(1, 2)).view(num_seqs, num_kv_heads, num_q, -1, k.shape[1]) * scale
    if logit_soft_cap != 0.0:
        scores = logit_soft_cap * torch.tanh(scores / logit_soft_cap)
    key = torch.arange(num_pages * page_size, device=q.device)
    ends = kv_lens.view(num_seqs, 1, 1, 1, 1) - torch.arange(num_q - 1, -1, -1, device=q.device).view(1, 1, num_q, 1, 1)
    unseen = key >= ends if sliding_window == 0 else (key >= ends) | (key < ends - sliding_window)
    weights = scores.masked_fill_(unseen, float("-inf")).softmax(dim=-1)
    # values beyond the sequence may be anything, and 0 · NaN is NaN
    v.view(num_seqs, num_kv_heads, -1, head_dim).masked_fill_((key >= kv_lens.view(-1, 1)).view(num_seqs, 1, -1, 1), 0.0)
    found = torch.bmm(weights.view(num_seqs * num_kv_heads, -1, num_pages * page_size), v)
    found = found.view(num_seqs, num_kv_heads, num_q, -1, head_dim).masked_fill_(ends <= 0, 0.0)
    found = found.transpose(1, 2).reshape(q.shape).to(q.dtype).contiguous()
    if out is None:
        return found
    return out.copy_(torch.where((kv_lens > 0).view(-1, *[1] * (q.dim() - 1)), found, out))
