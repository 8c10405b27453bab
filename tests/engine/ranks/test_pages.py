"""When a rank may copy the blocks of a step that it computes itself."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfmoon.engine.kv_cache import PagedKVCache
from halfmoon.engine.ranks.link import Link
from halfmoon.engine.ranks.memory import SharedMemory, create_buffer
from halfmoon.engine.ranks.pages import KEPT_STEPS, NO_STEP, Behind, PageCall, RankPages, StepProgress
from halfmoon.engine.ranks.processes import DONE
from halfmoon.engine.shard import Shard
from halfmoon.protocol.schema import KVSchema

HANG_S = 60.0


@pytest.fixture
def reading() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def made() -> StepProgress:
    numbers = iter(range(1000))
    return StepProgress(lambda: next(numbers))  # type: ignore[return-value]  # an event for each layer, told apart


def test_pages_that_no_step_writes_to_are_copied_at_once() -> None:
    assert made().wait(NO_STEP) is None


def test_a_copy_waits_for_its_layer_of_its_step(reading: ThreadPoolExecutor) -> None:
    progress = made()
    waiting: Any = reading.submit(progress.wait, Behind(2, 1))
    first = progress.hook(1)
    first(0)
    first(1)
    second = progress.hook(2)
    second(0)
    assert not waiting.done()
    second(1)
    assert waiting.result(HANG_S) == 3, "the event of that layer"
    assert progress.wait(Behind(1, 0)) == 0, "an earlier step's are known still"


def test_a_copy_of_a_step_that_is_long_over_waits_for_all_that_was_given_since() -> None:
    progress = made()
    for step in range(1, 2 + KEPT_STEPS):
        progress.hook(step)(0)
    assert progress.wait(Behind(2, 0)) == 1
    assert progress.wait(Behind(1, 0)) == 1 + KEPT_STEPS, "a new event"


def test_a_rank_copies_its_heads_of_a_step_s_block_once_they_stand_in_its_pages(reading: ThreadPoolExecutor) -> None:
    schema, shard = KVSchema("m", "float32", num_layers=1, num_kv_heads=2, head_dim=4, block_size=2), Shard(1, 2)
    cache = PagedKVCache(shard.pages_of(schema), 3, torch.device("cpu"))
    handle = create_buffer(schema.layer_bytes)
    memory = SharedMemory(handle)
    os.close(handle)
    rank_0, other = (Link(end) for end in socket.socketpair())
    engine: Any = SimpleNamespace(cache=cache, schema=schema, device=torch.device("cpu"))
    pages = RankPages(engine, shard, other, memory, on_crash=lambda error: pytest.fail(str(error)))
    wait, waits = pages.progress.wait, threading.Event()

    def watched(behind: Behind) -> Any:
        waits.set()
        return wait(behind)

    pages.progress.wait = watched  # type: ignore[method-assign]
    serving = reading.submit(pages.serve)
    rank_0.send(
        [PageCall.OUT, 1, 5, 0, 0, 1, 1, 2, 0, 0, 1, schema.layer_bytes]
    )  # call 1 behind step 5: layer 0 of page 2, into the buffer
    assert waits.wait(HANG_S)
    layer_done = pages.progress.hook(5)
    cache.data[0, :, 2] = 7.0
    layer_done(0)
    assert rank_0.receive() == [DONE, 1, True]
    block = torch.from_numpy(memory.buffer).view(torch.float32).view(schema.layer_shape)
    assert (block[:, 1] == 7.0).all() and not block[:, 0].any(), "rank 0's heads are rank 0's to write"
    rank_0.close()
    serving.result(HANG_S)
    pages.close()
    other.close()
