"""From a block mask to the lists that kernels follow: for a block of queries, the blocks of keys that it may see, in order.

mask  1 0 0 1 0 1  ─►  count 3, blocks 0 3 5 . . .      one row for 64 queries, one column for 64 keys
"""

from __future__ import annotations

import torch

SPARSE_BLOCK = 64


def live_blocks(
    block_mask: torch.Tensor, cu_seqlens_q: torch.Tensor, kv_lens: torch.Tensor, causal: bool, sliding_window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nothing is read back to the host.

    Args:
        block_mask: bool [num_seqs, num_heads, ceil(max_seqlen_q / 64), ceil(max_kv_len / 64)]; a broadcast dimension of heads stays one.
        cu_seqlens_q, kv_lens, causal, sliding_window: as the attention's; blocks that they hide as a whole are left out.

    Returns:
        How many, int32 [num_seqs, num_heads, query blocks], with the mask's broadcast heads; and which, int32 [..., key blocks],
        the first so many of each row.
    """
    heads = 1 if block_mask.stride(1) == 0 else block_mask.shape[1]
    device = block_mask.device
    keys = torch.arange(block_mask.shape[3], device=device) * SPARSE_BLOCK
    offsets = torch.arange(block_mask.shape[2], device=device) * SPARSE_BLOCK
    first = (kv_lens - cu_seqlens_q.diff())[:, None, None, None] + offsets[:, None]  # a block's first position
    seen = keys < kv_lens[:, None, None, None]
    if causal:
        seen = seen & (keys < first + SPARSE_BLOCK)
    if sliding_window > 0:
        seen = seen & (keys + SPARSE_BLOCK > first - sliding_window + 1)
    live = block_mask[:, :heads] & seen
    counts = live.sum(dim=-1, dtype=torch.int32)
    blocks = live.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices.int()
    return counts.expand(-1, block_mask.shape[1], -1), blocks.expand(-1, block_mask.shape[1], -1, -1)
