"""What of decode graphs needs no GPU; the rest is in test_cuda_engine.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.decode_graph import BATCH_SIZES, batch_size_for, batch_sizes, can_capture, likeliest


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


@pytest.mark.parametrize("vocab_size", [7, 64, 1000, 4096])
def test_the_likeliest_token_is_the_first_of_equals(vocab_size):
    logits = torch.randint(-3, 3, (9, vocab_size), generator=torch.Generator().manual_seed(vocab_size)).float()
    assert likeliest(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]
