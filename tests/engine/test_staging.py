from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.staging import ALIGNMENT, DTYPES, Staging, layout, pack

KINDS = (np.int64, np.int32, np.float32)


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 100), max_size=6))
def test_ranges_are_aligned_and_do_not_overlap(sizes):
    offsets, end = layout(sizes)
    taken = sorted((offsets[name], offsets[name] + num_bytes) for name, num_bytes in sizes.items())
    assert all(first % ALIGNMENT == 0 for first, _ in taken)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert end == sum(-(-num_bytes // ALIGNMENT) * ALIGNMENT for num_bytes in sizes.values())


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), min_size=1, max_size=2)), max_size=5), st.integers(0, 99))
def test_what_is_packed_is_read_back_where_the_offsets_say(shapes, seed):
    generator = np.random.default_rng(seed)
    arrays = {str(index): generator.integers(-99, 99, shape).astype(kind) for index, (kind, shape) in enumerate(shapes)}
    _, num_bytes = layout({name: array.nbytes for name, array in arrays.items()})
    buffer = np.full(num_bytes, 255, dtype=np.uint8)
    offsets = pack(arrays, buffer)
    for name, array in arrays.items():
        read = np.frombuffer(buffer.tobytes()[offsets[name] : offsets[name] + array.nbytes], dtype=array.dtype).reshape(array.shape)
        assert (read == array).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_uploads_one_after_another_keep_their_values():
    staging = Staging(torch.device("cuda"))
    held = []
    for step in range(20):
        arrays = {"a": np.full((step % 3, 7), step, dtype=np.int64), "b": np.full(1 + 5000 * step, step / 2, dtype=np.float32)}
        held.append((step, staging.upload(arrays)))
    for step, tensors in held:
        assert tensors["a"].shape == (step % 3, 7) and bool((tensors["a"] == step).all())
        assert len(tensors["b"]) == 1 + 5000 * step and bool((tensors["b"] == step / 2).all())
        assert tensors["a"].dtype == torch.int64 and set(DTYPES.values()) >= {tensors["b"].dtype}
