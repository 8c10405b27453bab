"""The executor of one process: the engine's own tokens, and a step's blocks at their writers."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from halfmoon.engine.executor import BlockPush, StepFailed
from halfmoon.engine.local_executor import LocalExecutor
from halfmoon.engine.sequence import StepChunk
from halfmoon.protocol.errors import HalfmoonError, StoreUnavailable


class Listener:
    def __init__(self) -> None:
        self.closed = False
        self.errors: list[HalfmoonError] = []

    def push_failed(self, error: HalfmoonError) -> None:
        self.errors.append(error)


class MemoryWriter:
    """A lease of so many blocks, some of them there already. Fails every push with error, where it has one."""

    memory = None

    def __init__(self, num_blocks: int, present: tuple[int, ...] = (), error: HalfmoonError | None = None) -> None:
        self.present = [block in present for block in range(num_blocks)]
        self.error = error
        self.blocks: dict[tuple[int, int], bytes] = {}  # by layer and block

    def push(self, layer: int, first_block: int, blocks: np.ndarray) -> None:
        if self.error is not None:
            raise self.error
        for offset, block in enumerate(blocks):
            assert (layer, first_block + offset) not in self.blocks, "pushed twice"
            self.blocks[layer, first_block + offset] = block.tobytes()


@pytest.fixture
def made(lab: Callable[..., Any], checkpoint: Any) -> Iterator[tuple[Any, LocalExecutor, list[BaseException]]]:
    crashes: list[BaseException] = []
    rig = lab(checkpoint("llama3_gqa").folder)
    executor = LocalExecutor(rig.engine, "test", crashes.append)
    yield rig, executor, crashes
    executor.close()
    assert crashes == []


async def test_a_step_gives_the_next_token_of_every_chunk_that_ends_its_sequence(made: Any, prompts: Any) -> None:
    rig, executor, _ = made
    whole, part, other = (rig.sequence(prompts(length)) for length in (20, 30, 7))
    chunks = [StepChunk(whole, 0, 20), StepChunk(part, 0, 16), StepChunk(other, 0, 7)]
    samples = executor.run(chunks).samples
    logits = rig.engine.forward(chunks)
    assert [sample.token_id for sample in samples] == logits.argmax(dim=-1).tolist() and len(samples) == 2
    assert executor.run([StepChunk(part, 16, 8)]).samples == [], "nothing ends in it"


async def test_the_blocks_that_a_step_finishes_reach_their_writers_layer_by_layer(made: Any, prompts: Any) -> None:
    rig, executor, _ = made
    first, second = rig.sequence(prompts(24)), rig.sequence(prompts(16))
    writers, listener = [MemoryWriter(3, present=(1,)), MemoryWriter(2)], Listener()
    pushes = [BlockPush(first.pages, writers[0], 0, 3, listener), BlockPush(second.pages, writers[1], 0, 2, listener)]  # type: ignore[arg-type]
    executor.run([StepChunk(first, 0, 24), StepChunk(second, 0, 16)], pushes)
    await executor.pages.drained()
    for sequence, writer, blocks in ((first, writers[0], (0, 2)), (second, writers[1], (0, 1))):
        expected = {
            (layer, block): rig.engine.cache.read_bytes(layer, [sequence.pages[block]])[0].tobytes()
            for layer in range(rig.engine.schema.num_layers)
            for block in blocks
        }
        assert writer.blocks == expected
    assert listener.errors == []


async def test_a_push_that_fails_or_is_not_wanted_any_more_is_its_listener_s_alone(made: Any, prompts: Any) -> None:
    rig, executor, _ = made
    sequences = [rig.sequence(prompts(16, seed)) for seed in range(3)]
    broken, closed, sound = MemoryWriter(2, error=StoreUnavailable("gone")), MemoryWriter(2), MemoryWriter(2)
    listeners = [Listener(), Listener(), Listener()]
    listeners[1].closed = True
    pushes = [
        BlockPush(sequence.pages, writer, 0, 2, listener)  # type: ignore[arg-type]
        for sequence, writer, listener in zip(sequences, (broken, closed, sound), listeners, strict=True)
    ]
    executor.run([StepChunk(sequence, 0, 16) for sequence in sequences], pushes)
    await executor.pages.drained()
    assert {type(error) for error in listeners[0].errors} == {StoreUnavailable}
    assert not closed.blocks and len(sound.blocks) == 2 * rig.engine.schema.num_layers
    assert not listeners[1].errors and not listeners[2].errors


async def test_what_is_asked_of_the_pages_is_done_in_its_order(made: Any, prompts: Any) -> None:
    rig, executor, _ = made
    pages, cache = rig.allocator.allocate(2), rig.engine.cache
    blocks = np.full((2, cache.schema.layer_bytes), 1, dtype=np.uint8)
    landed = threading.Event()
    executor.pages.load(pages, SimpleNamespace(layer=0, first_block=0, blocks=blocks, num_layers=1))
    executor.pages.zero_tail(pages[1], 3)
    executor.pages.when_landed(landed.set)
    await executor.pages.drained()
    assert landed.is_set() and (cache.read_bytes(0, pages[:1]) == 1).all()
    tail = cache.data[0, :, pages[1], :, 3:]
    assert not tail.any() and cache.data[0, :, pages[1], :, :3].all()
    writer = MemoryWriter(2)
    await asyncio.wrap_future(executor.pages.store(pages, writer, range(1)))  # type: ignore[arg-type]
    assert writer.blocks[0, 0] == blocks[0].tobytes()


async def test_what_a_worker_has_to_know_of_the_model_is_told(made: Any) -> None:
    rig, executor, _ = made
    facts, engine = executor.facts, rig.engine
    assert (facts.schema, facts.vocab_size, facts.max_model_len) == (engine.schema, engine.config.vocab_size, engine.max_model_len)
    assert (facts.num_pages, facts.page_size, facts.device) == (256, 8, "cpu")
    assert executor.launch([]) is None, "there are no graphs on a CPU"


def test_a_step_that_can_not_be_computed_says_what_of_it_was_pushed(made: Any, prompts: Any) -> None:
    rig, executor, _ = made
    sequence, num_layers = rig.sequence(prompts(16)), rig.engine.schema.num_layers
    writer, forward = MemoryWriter(2), rig.engine.forward
    pushes = [BlockPush(sequence.pages, writer, 0, 2, Listener())]  # type: ignore[arg-type]
    with pytest.raises(StepFailed, match="ValueError") as caught:
        executor.run([StepChunk(sequence, 0, 999)], pushes)
    assert caught.value.num_pushed_layers == 0

    def fails(chunks: Any, after_layer: Any) -> None:
        forward(chunks, after_layer=after_layer)
        raise RuntimeError("behind the last layer")

    rig.engine.forward = fails
    with pytest.raises(StepFailed, match="behind the last layer") as caught:
        executor.run([StepChunk(sequence, 0, 16)], pushes)
    del rig.engine.forward
    assert caught.value.num_pushed_layers == num_layers


def test_pages_are_scrubbed_of_what_is_no_number_and_of_nothing_else(made: Any) -> None:
    rig, executor, _ = made
    pages, data = rig.allocator.allocate(2), rig.engine.cache.data
    data[:, :, pages] = torch.arange(data[:, :, pages].numel(), dtype=data.dtype).view(data[:, :, pages].shape)
    wanted = data.clone()
    for value in (math.nan, math.inf, -math.inf):
        data[1, 1, pages[0], 0, 3, 2] = value
        wanted[1, 1, pages[0], 0, 3, 2] = 0.0
        executor.scrub(pages)
        assert torch.equal(data, wanted)
