"""Runs the decoder once over every kind of batch, so that no request waits for a kernel to be compiled.

Triton compiles a kernel for the tiles that the longest chunk needs, and for the divisibility of its numbers (1, a multiple of 16,
neither). The batches write their KV to a page that no sequence owns.
"""

from __future__ import annotations

import numpy as np
import torch

from .batch import TABLE_ALIGNMENT, StepBatch, batch_of
from .decoder import Decoder
from .kv_cache import PagedKVCache
from .staging import Staging
from .weights import Progress

NUM_SEQS = (1, 2, 16)
CHUNK_LENS = (1, 2, 4, 8, 16, 32, 33, 64, 65, 128)
LONG_CHUNK = 128
"""From this length on kernels also choose by the length of the context."""

Shape = tuple[int, int, int]
"""(sequences, tokens of each, KV of each)"""


def warm_up_shapes(max_model_len: int) -> list[Shape]:
    shapes = [(count, length, length) for length in CHUNK_LENS if length <= max_model_len for count in NUM_SEQS]
    kv_len = 2 * LONG_CHUNK
    while kv_len < max_model_len:
        shapes += [(count, LONG_CHUNK, kv_len) for count in NUM_SEQS]
        kv_len *= 2
    # few queries over many keys, for which kernels split the keys
    longest = min(kv_len // 2, max_model_len)
    return shapes + [(1, length, longest) for length in CHUNK_LENS if length < longest]


@torch.inference_mode()
def warm_up(
    decoder: Decoder, cache: PagedKVCache, scratch_page: int, max_model_len: int, staging: Staging, progress: Progress | None = None
) -> None:
    """progress is called with ("compiling kernels", batches done, batches in all)."""
    shapes = warm_up_shapes(max_model_len)
    for done, shape in enumerate(shapes):
        if progress is not None:
            progress("compiling kernels", done, len(shapes))
        decoder.forward(_batch(shape, cache, scratch_page, staging), cache)
    cache.write_blocks(0, [scratch_page], cache.read_blocks(0, [scratch_page]))  # the copies of a hand-off
    torch.cuda.synchronize(cache.data.device)
    if progress is not None:
        progress("compiling kernels", len(shapes), len(shapes))


def _batch(shape: Shape, cache: PagedKVCache, scratch_page: int, staging: Staging) -> StepBatch:
    count, length, kv_len = shape
    width = -(-kv_len // cache.page_size)
    tensors = staging.upload(
        {
            "token_ids": np.zeros(count * length, dtype=np.int64),
            "positions": np.tile(np.arange(kv_len - length, kv_len, dtype=np.int64), count),
            "slot_mapping": np.full(count * length, scratch_page * cache.page_size, dtype=np.int64),
            "block_table": np.full((count, -(-width // TABLE_ALIGNMENT) * TABLE_ALIGNMENT), scratch_page, dtype=np.int32),
            "cu_seqlens_q": np.arange(count + 1, dtype=np.int32) * np.int32(length),
            "kv_lens": np.full(count, kv_len, dtype=np.int32),
            "last_rows": np.arange(1, count + 1, dtype=np.int64) * length - 1,
        }
    )
    return batch_of(tensors, max_seqlen_q=length, max_kv_len=kv_len)
