"""What of the graphs of mixed steps needs no GPU; the rest is in test_cuda_mixed_steps.py."""

from __future__ import annotations

import pytest

from halfmoon.engine.graph_sizes import MAX_CAPTURED_ROWS, batch_size_for
from halfmoon.engine.mixed_graph import row_counts
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.step_graphs import sampled_chunks
from halfmoon.protocol.sampling import SamplingParams


def test_a_graph_is_never_an_eighth_larger_than_a_large_step() -> None:
    counts = row_counts(MAX_CAPTURED_ROWS)
    assert counts[-1] == MAX_CAPTURED_ROWS
    for rows in range(512, MAX_CAPTURED_ROWS + 1):
        found = batch_size_for(rows, counts)
        assert found is not None and rows <= found <= rows * 1.125 + 1


@pytest.mark.parametrize("chunk_len", [512, 1024, 2048])
def test_sixteen_decode_tokens_beside_a_round_chunk_cost_few_rows_of_padding(chunk_len: int) -> None:
    found = batch_size_for(chunk_len + 16, row_counts(MAX_CAPTURED_ROWS))
    assert found is not None and found - chunk_len <= 64


def test_small_steps_need_only_small_graphs() -> None:
    assert row_counts(100) == (16, 32, 64, 128)


def test_a_chunk_samples_where_its_sequence_ends_with_it_or_one_token_before_it() -> None:
    one = Sequence("r", list(range(10)), 10, SamplingParams())
    spans = [(0, 10), (9, 1), (10, 1), (4, 6), (0, 9), (8, 1)]
    assert [bool(sampled_chunks([StepChunk(one, *span)])) for span in spans] == [True, True, True, True, False, False]
