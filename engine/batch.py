"""StepBatch: the chunks of one step as the tensors that the decoder and the kernels read.

chunks      [seq A: 3 tokens] [seq B: 1 token]
token_ids   a5 a6 a7 b9        positions 5 6 7 9       cu_seqlens_q 0 3 4      kv_lens 8 10
slot_mapping                   page * page_size + offset of each token
block_table [[pages of A, 0 …], [pages of B, 0 …]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .sequence import StepChunk
from .staging import Staging

# Triton compiles a kernel separately for strides of 1, of multiples of 16, and of neither; this allows only one of the three
TABLE_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class StepBatch:
    token_ids: torch.Tensor  # int64 [num_tokens]
    positions: torch.Tensor  # int64 [num_tokens]
    slot_mapping: torch.Tensor  # int64 [num_tokens]
    block_table: torch.Tensor  # int32 [num_seqs, max_pages]
    cu_seqlens_q: torch.Tensor  # int32 [num_seqs + 1]
    kv_lens: torch.Tensor  # int32 [num_seqs]
    last_rows: torch.Tensor  # int64 [num_last]: row of the last token of each chunk with is_last
    max_seqlen_q: int
    max_kv_len: int
    # Decode tokens come before the chunks: row i is a token of decode_table[i]. In the fields above they are sequence 0, with kv_len 0.
    decode_table: torch.Tensor | None = None  # int32 [num_decodes, max_pages]
    decode_lens: torch.Tensor | None = None  # int32 [num_decodes], 0 if the row belongs to a chunk
    usual_num_seqs: int | None = None  # rows of block_table that are normally used, if the others are spare

    @property
    def is_decode(self) -> bool:
        return self.max_seqlen_q == 1 and self.decode_lens is None


def prepare_batch(chunks: Sequence[StepChunk], page_size: int, device: torch.device, staging: Staging | None = None) -> StepBatch:
    """With staging in one copy. Raises ValueError for a chunk that is empty, beyond its sequence's tokens, or without a page."""
    arrays = step_arrays(chunks, page_size, 1 if staging is None else TABLE_ALIGNMENT)
    if staging is None:
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    else:
        tensors = staging.upload(arrays)
    ends = [chunk.start + chunk.num_tokens for chunk in chunks]
    return batch_of(tensors, max_seqlen_q=max(chunk.num_tokens for chunk in chunks), max_kv_len=max(ends))


def batch_of(tensors: Mapping[str, torch.Tensor], max_seqlen_q: int, max_kv_len: int) -> StepBatch:
    """tensors: those of StepBatch, by name."""
    return StepBatch(
        token_ids=tensors["token_ids"],
        positions=tensors["positions"],
        slot_mapping=tensors["slot_mapping"],
        block_table=tensors["block_table"],
        cu_seqlens_q=tensors["cu_seqlens_q"],
        kv_lens=tensors["kv_lens"],
        last_rows=tensors["last_rows"],
        max_seqlen_q=max_seqlen_q,
        max_kv_len=max_kv_len,
    )


def step_arrays(chunks: Sequence[StepChunk], page_size: int, table_alignment: int = 1) -> dict[str, np.ndarray]:
    """StepBatch's tensors by name. The block table's width is a multiple of table_alignment."""
    check_chunks(chunks, page_size)
    ends = [chunk.start + chunk.num_tokens for chunk in chunks]
    lens = [chunk.num_tokens for chunk in chunks]
    cu_seqlens = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(lens, out=cu_seqlens[1:])
    token_ids: list[int] = []
    for chunk, end in zip(chunks, ends, strict=True):
        token_ids += chunk.sequence.token_ids[chunk.start : end]
    owner = np.repeat(np.arange(len(chunks)), lens)
    starts = np.fromiter((chunk.start for chunk in chunks), dtype=np.int64, count=len(chunks))
    positions = np.arange(len(token_ids)) + (starts - cu_seqlens[:-1])[owner]
    width = max(-(-end // page_size) for end in ends)
    block_table = np.zeros((len(chunks), -(-width // table_alignment) * table_alignment), dtype=np.int32)
    for row, chunk, end in zip(block_table, chunks, ends, strict=True):
        num_pages = -(-end // page_size)
        row[:num_pages] = chunk.sequence.pages[:num_pages]
    slot_mapping = block_table[owner, positions // page_size].astype(np.int64) * page_size + positions % page_size
    last_rows = [int(end) - 1 for end, chunk in zip(cu_seqlens[1:], chunks, strict=True) if chunk.is_last]
    return {
        "token_ids": np.array(token_ids, dtype=np.int64),
        "positions": positions.astype(np.int64),
        "slot_mapping": slot_mapping,
        "block_table": block_table,
        "cu_seqlens_q": cu_seqlens,
        "kv_lens": np.array(ends, dtype=np.int32),
        "last_rows": np.array(last_rows, dtype=np.int64),
    }


def check_chunks(chunks: Sequence[StepChunk], page_size: int) -> None:
    """Raises ValueError for a chunk that is empty, beyond its sequence's tokens, or without a page."""
    for chunk in chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        if chunk.num_tokens < 1 or chunk.start < 0 or end > sequence.num_tokens:
            raise ValueError(f"{sequence.request_id}: chunk {chunk.start} to {end} is not within its {sequence.num_tokens} tokens")
        if end > len(sequence.pages) * page_size:
            raise ValueError(f"{sequence.request_id}: {end} tokens need more than its {len(sequence.pages)} pages of {page_size}")
