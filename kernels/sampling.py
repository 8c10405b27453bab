"""Draws one token a row of logits, or says that there is none to draw."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import sampling as reference
from .reference.sampling import NO_TOKEN

__all__ = ["NO_TOKEN", "likeliest", "sampling"]


def sampling(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    seeds: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """A row's token depends on that row and its parameters alone, and on no other row.

    The distribution softmax(logits / temperature) is cut by top_k, then top_p of what is left, then min_p; tokens as
    likely as the last one kept are kept too. The token is the inverse of the cumulated distribution, in the vocabulary's
    order, at the uniform number that Philox4x32-10 gives for (seed, index); see kernels/reference/philox.py.

    Args:
        logits: fp32 [n, vocab_size]; -inf: never drawn.
        temperatures: fp32 [n]; 0: the likeliest token, the first of equals.
        top_ks: int64 [n]; 0: all.
        top_ps: fp32 [n] in (0, 1]; 1: all.
        min_ps: fp32 [n] in [0, 1]: tokens below min_p times the likeliest's probability are cut; 0: none.
        seeds: int64 [n], the bits of an unsigned seed.
        indices: int64 [n], which draw of the seed this is: the output index.

    Returns:
        int64 [n], on the logits' device; NO_TOKEN for a row with NaN or +inf in it, or without a number above -inf.
    """
    if logits.is_cuda:
        return implementation("sampling", logits.device)(logits, temperatures, top_ks, top_ps, min_ps, seeds, indices)
    return reference.sampling(logits, temperatures, top_ks, top_ps, min_ps, seeds, indices)


def likeliest(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """sampling() at temperature 0, in two stages where that can be: over a single row torch's argmax takes 36 us on an H200.

    Writes into out, where it is given.
    """
    num_rows, vocab_size = logits.shape
    num_parts = next((count for count in (256, 128, 64, 32) if vocab_size % count == 0), 1)
    values, indices = logits.view(num_rows, num_parts, -1).max(dim=-1)
    largest, part = values.max(dim=-1, keepdim=True)  # NaN, where there is one
    tokens = torch.add(indices.gather(1, part).squeeze(1), part.squeeze(1), alpha=vocab_size // num_parts, out=out)
    # few kernels, for this stands in the graph of every step: x - x is 0 for finite x alone
    return tokens.masked_fill_((largest - largest).squeeze(1) != 0.0, NO_TOKEN)
