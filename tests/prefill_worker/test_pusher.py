"""Which blocks a chunk finishes, and which of them travel."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.executor import BlockPush
from halfmoon.engine.page_transfer import LocalPageTransfer
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.slice_copy import missing_runs
from halfmoon.prefill_worker.pusher import finished_blocks
from halfmoon.protocol.sampling import SamplingParams


@given(present=st.lists(st.booleans(), max_size=20), data=st.data())
def test_runs_cover_each_missing_block_once_and_are_maximal(present: list[bool], data: Any) -> None:
    first = data.draw(st.integers(0, len(present)))
    last = data.draw(st.integers(first, len(present)))
    runs = missing_runs(present, first, last)
    covered = [block for start, end in runs for block in range(start, end)]
    assert covered == [block for block in range(first, last) if not present[block]]
    assert all(earlier[1] < later[0] for earlier, later in itertools.pairwise(runs))


@given(
    num_tokens=st.integers(1, 60),
    num_cached_blocks=st.integers(0, 10),
    sizes=st.lists(st.integers(1, 4), min_size=60, max_size=60),
)
def test_prefix_and_chunks_finish_every_block_exactly_once(num_tokens: int, num_cached_blocks: int, sizes: list[int]) -> None:
    block_size = 4
    sequence = Sequence("r", [0] * num_tokens, num_tokens, SamplingParams())
    start = min(num_cached_blocks * block_size, num_tokens - 1)
    finished = list(range(start // block_size))
    job: Any = SimpleNamespace(sequence=sequence, writer=object())  # passed through
    while start < num_tokens:
        end = min(start // block_size * block_size + sizes.pop() * block_size, num_tokens)
        run = finished_blocks(job, StepChunk(sequence, start, end - start), block_size)
        finished += range(run.first, run.last)
        start = end
    assert finished == list(range(-(-num_tokens // block_size)))


def pushed_ranges(num_layers: int, num_blocks: int, layer_bytes: int) -> list[range]:
    """The layers that a step of num_layers layers gives the transfer thread at a time."""
    found: list[range] = []
    schema = SimpleNamespace(num_layers=num_layers, layer_bytes=layer_bytes)
    transfer = SimpleNamespace(submit=lambda call, after: found.append(call.args[2]), event=lambda: None)
    pages = LocalPageTransfer(SimpleNamespace(schema=schema), transfer)  # type: ignore[arg-type]
    layer_done = pages.after_layer([BlockPush([], None, 0, num_blocks, None)])  # type: ignore[arg-type]
    for layer in range(num_layers):
        layer_done(layer)
    return found


@pytest.mark.parametrize(("num_layers", "num_blocks"), [(32, 128), (32, 32), (32, 1), (32, 0), (5, 4), (2, 1), (1, 1)])
def test_every_layer_goes_once_and_in_order(num_layers, num_blocks) -> None:
    found = pushed_ranges(num_layers, num_blocks, 256 * 1024)
    assert [layer for layers in found for layer in layers] == list(range(num_layers))


@pytest.mark.parametrize("num_blocks", [128, 32])
def test_many_blocks_go_some_layers_at_a_time_and_the_last_layer_alone(num_blocks) -> None:
    found = pushed_ranges(32, num_blocks, 256 * 1024)
    assert len(found[0]) == 4 and len(found[-1]) == 1


def test_layers_of_few_bytes_go_together_so_that_a_step_makes_few_pushes() -> None:
    assert len(pushed_ranges(32, 1, 256 * 1024)) == 2
