from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.kvstore.progress import Progress, SliceCursor, SliceRange
from halfmoon.protocol.errors import HandoffIncomplete, InvalidRequest


@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_a_cursor_hands_every_layer_of_every_block_on_once_and_in_order(
    data: st.DataObject, num_blocks: int, num_layers: int, max_blocks: int, max_rows: int
) -> None:
    present = data.draw(st.lists(st.booleans(), min_size=num_blocks, max_size=num_blocks))
    progress = Progress(num_blocks, num_layers, present)
    cursor = SliceCursor(progress)
    written = {(layer, block) for block in range(num_blocks) if present[block] for layer in range(num_layers)}
    taken: list[tuple[int, int]] = []

    def take(found: SliceRange) -> None:
        assert 1 <= found.num_blocks <= max_blocks and (found.num_layers == 1 or found.num_layers * found.num_blocks <= max_rows)
        rows = itertools.product(range(found.num_layers), range(found.num_blocks))
        taken.extend((found.layer + layer, found.first_block + block) for layer, block in rows)

    while not cursor.is_complete:
        while data.draw(st.booleans()) and (found := cursor.take(max_blocks, max_rows)) is not None:
            take(found)
        assert set(taken) <= written
        open_blocks = [block for block in range(num_blocks) if progress.num_layers_done[block] < num_layers]
        if open_blocks:
            block = data.draw(st.sampled_from(open_blocks))
            layer = int(progress.num_layers_done[block])
            progress.record(layer, block, 1)
            written.add((layer, block))
        else:
            while (found := cursor.take(max_blocks, max_rows)) is not None:
                take(found)
    assert sorted(taken) == sorted(written) and progress.is_complete
    for block in range(num_blocks):
        assert [layer for layer, found in taken if found == block] == list(range(num_layers))


def test_what_is_written_already_is_taken_layer_by_layer() -> None:
    cursor = SliceCursor(Progress(5, 2, [True] * 5))
    assert [cursor.take(3) for _ in range(5)] == [(0, 0, 3, 1), (0, 3, 2, 1), (1, 0, 3, 1), (1, 3, 2, 1), None]


def test_layers_of_few_blocks_are_taken_together_as_far_as_all_of_them_are_written() -> None:
    progress = Progress(3, 8)
    progress.record(0, 0, 3, 2)
    progress.record(2, 0, 2, 5)
    cursor = SliceCursor(progress)
    assert [cursor.take(3, 9) for _ in range(4)] == [(0, 0, 3, 2), (2, 0, 2, 4), (6, 0, 2, 1), None]


@pytest.mark.parametrize(("layer", "first", "count"), [(2, 0, 1), (-1, 0, 1), (0, 0, 4), (0, 3, 1), (0, 0, 0), (0, -1, 1)])
def test_a_slice_outside_is_refused(layer: int, first: int, count: int) -> None:
    with pytest.raises(InvalidRequest, match="the lease has 2 layers and 3 blocks"):
        Progress(3, 2).record(layer, first, count)


def test_missing_blocks_and_layers_are_named_and_a_long_list_is_cut() -> None:
    progress = Progress(12, 4)
    progress.record(0, 0, 2)
    progress.record(1, 1, 1)
    with pytest.raises(HandoffIncomplete, match=r"hand-off h is incomplete.*block 0 from layer 1, block 1 from layer 2.*and 4 more blocks"):
        progress.require_complete("hand-off h")


def test_no_block_is_complete_from_the_start() -> None:
    progress = Progress(0, 4)
    assert progress.is_complete and SliceCursor(progress).take(1) is None
    progress.require_complete("nothing")
