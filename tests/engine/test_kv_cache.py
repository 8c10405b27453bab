from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmoon.engine.kv_cache import PagedKVCache, block_bytes, blocks_from_bytes
from halfmoon.protocol.schema import KVSchema

LAYERS, HEADS, PAGE_SIZE, HEAD_DIM, NUM_PAGES = 2, 3, 4, 6, 7


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit: torch compares no fp8."""
    return one.shape == other.shape and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.fixture(params=["float32", "bfloat16", "float16", "float8_e4m3fn"])
def cache(request) -> PagedKVCache:
    built = PagedKVCache(KVSchema("f" * 32, request.param, LAYERS, HEADS, HEAD_DIM, PAGE_SIZE), NUM_PAGES, torch.device("cpu"))
    built.data.copy_(torch.randn(built.data.shape, generator=torch.Generator().manual_seed(0)))
    return built


def test_a_new_cache_is_zeros_of_the_contracts_shape():
    cache = PagedKVCache(KVSchema("f" * 32, "bfloat16", LAYERS, HEADS, HEAD_DIM, PAGE_SIZE), NUM_PAGES, torch.device("cpu"))
    assert cache.data.shape == (LAYERS, 2, NUM_PAGES, HEADS, PAGE_SIZE, HEAD_DIM) and not cache.data.any()
    assert cache.layer(1).data_ptr() == cache.data[1].data_ptr()


def test_blocks_are_read_in_the_canonical_order(cache):
    blocks = cache.read_blocks(1, [5, 0])
    assert blocks.shape == (2, 2, HEADS, PAGE_SIZE, HEAD_DIM) and blocks.is_contiguous()
    for place, page in enumerate((5, 0)):
        for side in range(2):
            assert same(blocks[place, side], cache.data[1, side, page])


def test_a_slice_of_bytes_is_k_then_v_head_by_head_token_by_token(cache):
    data = cache.read_bytes(0, [3])
    assert data.shape == (1, cache.schema.layer_bytes) and data.dtype == np.uint8
    numbers = [cache.data[0, side, 3, head, token] for side in range(2) for head in range(HEADS) for token in range(PAGE_SIZE)]
    assert data.tobytes() == torch.cat(numbers).view(torch.uint8).numpy().tobytes()


def test_written_blocks_are_read_back_and_no_other_page_changes(cache):
    before = cache.data.clone()
    blocks = cache.read_blocks(0, [2, 3])
    cache.write_blocks(1, [6, 4], blocks)
    assert same(cache.read_blocks(1, [6, 4]), blocks)
    before[1, :, [6, 4]] = cache.data[1, :, [6, 4]]
    assert same(cache.data, before)


def test_bytes_go_the_same_way_as_blocks_from_read_only_arrays_too(cache):
    data = cache.read_bytes(0, [1, 2])
    data.flags.writeable = False
    cache.write_bytes(1, [6, 4], list(data))
    assert same(cache.read_blocks(1, [6, 4]), cache.read_blocks(0, [1, 2]))


def test_a_copy_survives_later_writes(cache):
    blocks, data = cache.read_blocks(0, [2]), cache.read_bytes(0, [2])
    kept = blocks.clone()
    cache.data.zero_()
    assert same(blocks, kept) and data.any()


def test_a_block_of_another_size_is_refused_before_anything_is_written(cache):
    before = cache.data.clone()
    good, bad = cache.read_bytes(0, [1])[0], np.zeros(cache.schema.layer_bytes - 1, dtype=np.uint8)
    with pytest.raises(ValueError, match=f"has {len(bad)} bytes; this cache takes {len(good)}"):
        cache.write_bytes(0, [0, 1], [good, bad])
    with pytest.raises(ValueError, match="shorter"):
        cache.write_bytes(0, [0, 1], [good])
    assert same(cache.data[1:], before[1:]) and same(cache.data[0, :, 1:], before[0, :, 1:])


def test_zero_tail_clears_the_tokens_behind_in_every_layer_and_no_others(cache):
    before = cache.data.clone()
    cache.zero_tail(2, 3)
    assert not cache.data[:, :, 2, :, 3:].float().any()
    before[:, :, 2, :, 3:] = 0
    assert same(cache.data, before)


def test_block_bytes_and_blocks_from_bytes_are_inverse(cache):
    blocks = cache.read_blocks(0, [0, 3, 5])
    assert same(blocks_from_bytes(block_bytes(blocks), cache.schema), blocks)


def test_the_cache_may_be_written_inside_and_outside_of_inference_mode(cache):
    with torch.inference_mode():
        blocks = cache.read_blocks(0, [0])
        cache.write_blocks(0, [1], blocks)
    cache.write_blocks(0, [2], blocks.clone())
    cache.write_bytes(0, [3], block_bytes(blocks))
    assert all(same(cache.read_blocks(0, [page]), blocks) for page in (1, 2, 3))


def test_scratch_pages_stand_behind_those_that_may_be_handed_out():
    built = PagedKVCache(
        KVSchema("f" * 32, "float32", LAYERS, HEADS, HEAD_DIM, PAGE_SIZE), NUM_PAGES, torch.device("cpu"), num_scratch_pages=1
    )
    assert built.num_pages == NUM_PAGES and built.data.shape[2] == NUM_PAGES + 1
    built.layer(0)[:, NUM_PAGES] = 1.0
    assert not built.read_blocks(0, range(NUM_PAGES)).any()
    blocks = built.read_bytes(0, [NUM_PAGES])
    built.write_bytes(1, [2], blocks)
    assert bool((built.read_blocks(1, [2]) == 1.0).all())
