"""Sampling in torch.

a row whose maximum is no finite number ─► NO_TOKEN
greedy rows ─► argmax
other rows  ─► − maximum, / temperature ─► cut: a threshold on the scaled logits ─► weights ─► cumulated ─► inverse at u(seed, index)
"""

from __future__ import annotations

import numpy as np
import torch

from .philox import uniform

NO_TOKEN = -1
"""The token of a row from which none can be drawn."""

# up to this top_k the k largest are selected; beyond, or for top_p alone, the row is sorted
MAX_SELECTED = 1024


def sampling(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    seeds: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """See kernels/sampling.py."""
    largest, tokens = logits.max(dim=-1)  # NaN, where there is one
    sound = largest.isfinite()
    tokens.masked_fill_(~sound, NO_TOKEN)
    rows = (sound & (temperatures > 0.0)).nonzero().squeeze(1)
    if len(rows) == 0:
        return tokens
    chosen = logits[rows]
    # the maximum first: a tiny temperature then gives 0 and -inf, and never inf - inf
    scaled = (chosen - largest[rows].unsqueeze(1)) / temperatures[rows].unsqueeze(1)
    keep = scaled >= _thresholds(scaled, top_ks[rows], top_ps[rows], min_ps[rows]).unsqueeze(1)
    weights = scaled.exp_().masked_fill_(~keep, 0.0)
    tokens[rows] = _invert(weights, seeds[rows], indices[rows])
    return tokens


def _thresholds(scaled: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """[n]: the smallest scaled logit that each row keeps. scaled: largest 0 in every row."""
    thresholds = min_ps.log()  # -inf where there is no min_p
    rows = ((top_ks > 0) | (top_ps < 1.0)).nonzero().squeeze(1)
    if len(rows) == 0:
        return thresholds
    num_kept = top_ks[rows].clamp(max=scaled.shape[1])
    num_kept = torch.where(num_kept == 0, scaled.shape[1], num_kept)
    # what a row's numbers are must not depend on its neighbours, so each row is cut at its own length below
    num_sorted = int(num_kept.max())
    if num_sorted <= MAX_SELECTED:
        values = scaled[rows].topk(num_sorted, dim=-1).values
    else:
        values = scaled[rows].sort(dim=-1, descending=True).values
    rank = torch.arange(values.shape[1], device=scaled.device)
    values = values.masked_fill(rank >= num_kept.unsqueeze(1), float("-inf"))
    # fp64, one after another: the same sums whatever else is in the batch
    cumulated = values.exp().cumsum(dim=-1, dtype=torch.float64)
    before = cumulated - values.exp()
    kept = (before < top_ps[rows].double().unsqueeze(1) * cumulated[:, -1:]) & (rank < num_kept.unsqueeze(1))
    smallest = values.gather(1, kept.sum(dim=-1, keepdim=True) - 1).squeeze(1)
    thresholds[rows] = torch.maximum(thresholds[rows], smallest)
    return thresholds


def _invert(weights: torch.Tensor, seeds: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulated weight exceeds u · total. u <= 1 - 2^-53 keeps u · total below total in fp64."""
    draws = uniform(seeds.cpu().numpy().view(np.uint64), indices.cpu().numpy().view(np.uint64))
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = torch.from_numpy(draws).to(weights.device).unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, targets, right=True).squeeze(1)
