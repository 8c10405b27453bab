"""What of decode graphs needs no GPU; the rest is in test_cuda_engine.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.decode_graph import can_capture, is_plain
from halfmoon.engine.graph_sizes import BATCH_SIZES, batch_size_for, batch_sizes
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.sampling import SamplingParams


@given(st.integers(1, 400))
def test_the_sizes_hold_every_batch_up_to_the_largest_and_no_more(max_batch):
    sizes = batch_sizes(max_batch)
    assert sizes == BATCH_SIZES[: len(sizes)]
    assert sizes[-1] >= max_batch or sizes == BATCH_SIZES
    assert len(sizes) == 1 or sizes[-2] < max_batch


def test_no_batches_need_no_sizes():
    assert batch_sizes(0) == ()


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_batch_runs_in_the_smallest_size_that_holds_it(num_seqs, max_batch):
    sizes = batch_sizes(max_batch)
    found = batch_size_for(num_seqs, sizes)
    if found is None:
        assert num_seqs > sizes[-1]
    else:
        assert found >= num_seqs and not any(num_seqs <= size < found for size in sizes)


def test_there_are_no_graphs_on_a_cpu():
    assert not can_capture(torch.device("cpu"))


@pytest.mark.parametrize(
    ("sampling", "plain"),
    [
        ({"temperature": 0.5, "top_k": 3, "seed": 7}, True),
        ({"presence_penalty": 0.5}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"num_logprobs": 0}, False),
        ({"min_tokens": 2}, False),
    ],
)
def test_a_plain_chunk_asks_for_nothing_but_the_draw(sampling, plain):
    sequence = Sequence("r", [1, 2, 3, 4], 4, SamplingParams(**sampling))
    assert is_plain(StepChunk(sequence, 3, 1)) is plain


def test_a_chunk_is_plain_from_min_tokens_on_with_the_tokens_on_their_way_among_them():
    sequence = Sequence("r", [1, 2, 3, 4, 5], 4, SamplingParams(min_tokens=2))
    assert [is_plain(StepChunk(sequence, start, 1)) for start in (3, 4, 5)] == [False, False, True]
