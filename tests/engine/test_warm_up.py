from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.warm_up import CHUNK_LENS, NUM_SEQS, warm_up_shapes


@given(st.integers(1, 200_000))
def test_no_shape_is_longer_than_the_model_takes(max_model_len):
    shapes = warm_up_shapes(max_model_len)
    assert all(1 <= length <= kv_len <= max_model_len for _, length, kv_len in shapes)
    assert {count for count, _, _ in shapes} == set(NUM_SEQS)
    assert {length for _, length, _ in shapes} == {length for length in CHUNK_LENS if length <= max_model_len}


def test_long_contexts_are_met_up_to_the_longest():
    longest = max(kv_len for _, _, kv_len in warm_up_shapes(131_072))
    assert 131_072 / 2 <= longest < 131_072
