from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.batch import prepare_batch
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.sampling import SamplingParams

CPU = torch.device("cpu")


def sequence(num_tokens: int, pages: list[int], first: int = 0) -> Sequence:
    return Sequence(f"r{first}", list(range(first, first + num_tokens)), num_tokens, SamplingParams(), pages=pages)


def test_the_picture_of_the_module():
    a, b = sequence(8, [9, 4], 100), sequence(10, [2, 7, 5], 200)
    batch = prepare_batch([StepChunk(a, 5, 2), StepChunk(b, 9, 1)], page_size=4, device=CPU)
    assert batch.token_ids.tolist() == [105, 106, 209] and batch.positions.tolist() == [5, 6, 9]
    assert batch.slot_mapping.tolist() == [4 * 4 + 1, 4 * 4 + 2, 5 * 4 + 1]
    assert batch.block_table.tolist() == [[9, 4, 0], [2, 7, 5]]
    assert batch.cu_seqlens_q.tolist() == [0, 2, 3] and batch.kv_lens.tolist() == [7, 10]
    assert batch.last_rows.tolist() == [2] and (batch.max_seqlen_q, batch.max_kv_len) == (2, 10) and not batch.is_decode
    dtypes = {name: getattr(batch, name).dtype for name in ("token_ids", "positions", "slot_mapping", "last_rows")}
    assert set(dtypes.values()) == {torch.int64}
    assert {batch.block_table.dtype, batch.cu_seqlens_q.dtype, batch.kv_lens.dtype} == {torch.int32}


@given(
    page_size=st.integers(1, 9),
    shapes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=5),
)
def test_every_token_goes_to_the_slot_of_its_position(page_size, shapes):
    """Each shape: tokens before the chunk, in it, and after it."""
    next_page, chunks, wanted = 0, [], []
    for index, (start, count, behind) in enumerate(shapes):
        num_pages = -(-(start + count + behind) // page_size)
        one = sequence(start + count + behind, list(range(next_page, next_page + num_pages)), 1000 * index)
        next_page += num_pages
        chunks.append(StepChunk(one, start, count))
        wanted += [(one.token_ids[p], p, one.pages[p // page_size] * page_size + p % page_size) for p in range(start, start + count)]
    batch = prepare_batch(chunks, page_size, CPU)
    assert list(zip(batch.token_ids.tolist(), batch.positions.tolist(), batch.slot_mapping.tolist(), strict=True)) == wanted
    last = [batch.positions[row] for row in batch.last_rows]
    assert last == [chunk.sequence.num_tokens - 1 for chunk in chunks if chunk.is_last]
    for row, chunk in zip(batch.block_table.tolist(), chunks, strict=True):
        used = -(-(chunk.start + chunk.num_tokens) // page_size)
        assert row[:used] == chunk.sequence.pages[:used]


@pytest.mark.parametrize(("start", "count"), [(0, 0), (-1, 3), (6, 3)])
def test_a_chunk_outside_of_its_sequence_is_refused(start, count):
    with pytest.raises(ValueError, match="is not within its 8 tokens"):
        prepare_batch([StepChunk(sequence(8, [0, 1]), start, count)], 4, CPU)


def test_a_chunk_without_pages_is_refused():
    with pytest.raises(ValueError, match="5 tokens need more than its 1 pages of 4"):
        prepare_batch([StepChunk(sequence(8, [0]), 0, 5)], 4, CPU)
