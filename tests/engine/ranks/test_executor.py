"""Two ranks in two processes behind the executor: tokens, blocks and errors of one process, and how it ends when a rank does."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from halfmoon.engine.executor import BlockPush, DeviceLost, StepFailed
from halfmoon.engine.local_executor import LocalExecutor
from halfmoon.engine.ranks.executor import TensorParallelExecutor
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.kvstore.block_rows import BlockRows
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.errors import ConfigError, HalfmoonError
from halfmoon.protocol.sampling import SamplingParams

BLOCK_SIZE = 8
HANG_S = 60.0


class Rig(NamedTuple):
    ranks: TensorParallelExecutor
    alone: LocalExecutor
    arena: Any
    crashes: list[BaseException]


class Arena:
    """A file as a store's arena, mapped here."""

    def __init__(self, path: Path, schema: Any, num_slots: int) -> None:
        self.path, self.offset = str(path), mmap.PAGESIZE
        path.write_bytes(bytes(self.offset + num_slots * schema.block_bytes))
        with path.open("r+b") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
        self.memory = mapped[self.offset :].reshape(num_slots, schema.block_bytes)
        self.layer_bytes = schema.layer_bytes

    def rows(self, slots: list[int], layer: int, num_layers: int) -> BlockRows:
        width = self.layer_bytes
        return BlockRows([self.memory[slot : slot + 1, layer * width : (layer + num_layers) * width] for slot in slots])


class Writer:
    """A lease; arena: its blocks stand there, in slots from first_slot on. None: it takes arrays."""

    def __init__(self, num_blocks: int, arena: Arena | None = None, first_slot: int = 0, present: tuple[int, ...] = ()) -> None:
        self.present = [block in present for block in range(num_blocks)]
        self.memory = None if arena is None else arena.memory
        self.arena, self.first_slot = arena, first_slot
        self.blocks: dict[tuple[int, int], bytes] = {}  # by layer and block

    def push(self, layer: int, first_block: int, blocks: np.ndarray) -> None:
        self.blocks.update({(layer, first_block + at): block.tobytes() for at, block in enumerate(blocks)})

    def rows(self, layer: int, first_block: int, last_block: int, num_layers: int = 1) -> BlockRows:
        assert self.arena is not None
        return self.arena.rows([self.first_slot + block for block in range(first_block, last_block)], layer, num_layers)

    def pushed(self, layer: int, first_block: int, last_block: int, num_layers: int = 1) -> None:
        for one in range(layer, layer + num_layers):
            for block, row in enumerate(self.rows(one, first_block, last_block), first_block):
                assert (one, block) not in self.blocks, "pushed twice"
                self.blocks[one, block] = row.tobytes()

    def dropped(self) -> None:
        raise AssertionError("nothing goes wrong here")


class EvenTokens:
    """A grammar whose every token is of even id."""

    def fill(self, output_token_ids: Any, words: np.ndarray) -> None:
        assert all(token % 2 == 0 for token in output_token_ids)
        words[:] = 0x55555555


class Listener:
    closed = False

    def push_failed(self, error: HalfmoonError) -> None:
        raise error


def load(folder: Path, crashes: Callable[[BaseException], None], size: int = 2) -> TensorParallelExecutor:
    return TensorParallelExecutor.load_group(
        ModelOptions(path=str(folder), device="cpu", block_size=BLOCK_SIZE),
        size,
        kv_capacity_tokens=2048,
        num_threads=1,
        max_decode_batch=0,
        cpu_prompts=1,
        name="test",
        progress=lambda *_: None,
        on_crash=crashes,
    )


@pytest.fixture(scope="module")
def rig(lab: Any, checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder, crashes = checkpoint("llama3_gqa").folder, []
    ranks = load(folder, crashes.append)
    alone = LocalExecutor(lab(folder).engine, "alone", crashes.append)
    arena = Arena(tmp_path_factory.mktemp("arena") / "arena", alone.facts.schema, 16)
    ranks.pages.pin(arena)
    alone.pages.copy(0, 1).result(HANG_S)  # its threads begin here, and not in a test
    for executor in (ranks, alone):
        one = sequence([5], max_tokens=1)
        one.grammar = EvenTokens()
        executor.run([StepChunk(one, 0, 1)])
    yield Rig(ranks, alone, arena, crashes)
    ranks.close()
    alone.close()
    assert crashes == []


def sequence(tokens: list[int], first_page: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, **sampling})
    return Sequence(f"r{first_page}", list(tokens), len(tokens), params, pages=list(range(first_page, first_page + 8)))


def generate(executor: Any, sequences: list[Sequence], chunk_len: int, num_tokens: int) -> list[list[Any]]:
    """TokenSamples of each; chunks of prompts beside single decode tokens."""
    found: dict[Sequence, list[Any]] = {one: [] for one in sequences}
    while pending := [one for one in sequences if len(found[one]) < num_tokens]:
        chunks = [StepChunk(one, (at := one.num_computed_tokens), min(chunk_len, one.num_tokens - at)) for one in pending]
        ending = [chunk.sequence for chunk in chunks if chunk.is_last]
        outcome = executor.run(chunks)
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.start + chunk.num_tokens
        for one, sample in zip(ending, outcome.samples, strict=True):
            one.token_ids.append(sample.token_id)
            found[one].append(sample)
    return list(found.values())


def test_greedy_and_seeded_tokens_are_those_of_one_process_in_chunked_and_mixed_steps(rig: Rig, prompts: Any) -> None:
    asked = [
        (prompts(41), {}),
        (prompts(9, 1), {"temperature": 0.8, "seed": 2**63 + 11, "top_k": 40}),
        (prompts(17, 2), {"num_logprobs": 2, "repetition_penalty": 1.3, "logit_bias": {5: 3.0}}),
    ]

    def answers(executor: Any) -> list[list[Any]]:
        return generate(executor, [sequence(tokens, 8 * at, **sampling) for at, (tokens, sampling) in enumerate(asked)], 16, 10)

    ours, expected = answers(rig.ranks), answers(rig.alone)
    assert [[one.token_id for one in answer] for answer in ours] == [[one.token_id for one in answer] for answer in expected]
    for one, other in zip(ours[2], expected[2], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_a_grammar_holds_over_the_logits_of_both_ranks(rig: Rig, prompts: Any) -> None:
    def answer(executor: Any) -> list[int]:
        one = sequence(prompts(12), temperature=1.0, seed=4)
        one.grammar = EvenTokens()
        return [sample.token_id for sample in generate(executor, [one], 16, 12)[0]]

    ours = answer(rig.ranks)
    assert ours == answer(rig.alone) and max(ours) >= 128 > min(ours), "of both ranks' parts of the vocabulary"


def test_a_prompts_log_probabilities_come_from_both_ranks(rig: Rig, prompts: Any) -> None:
    def score(executor: Any) -> Any:
        scored = sequence(prompts(30))
        scored.num_prompt_logprobs = 2
        return executor.run([StepChunk(scored, 0, 30)]).prompt_logprobs[scored]

    ours, expected = score(rig.ranks), score(rig.alone)
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-4)
    assert (ours.ranks == expected.ranks).all()


def test_what_a_worker_is_told_is_the_whole_model(rig: Rig) -> None:
    ours, alone = rig.ranks.facts, rig.alone.facts
    assert (ours.schema, ours.vocab_size, ours.num_pages) == (alone.schema, alone.vocab_size, alone.num_pages)
    assert ours.weight_bytes == pytest.approx(alone.weight_bytes, rel=0.05)
    assert rig.ranks.pages.schema == alone.schema
    assert rig.ranks.launch([]) is None, "there are no graphs on a CPU"


@pytest.mark.parametrize("by_arena", [True, False], ids=["arena", "arrays"])
async def test_the_blocks_that_a_step_finishes_hold_every_ranks_heads(rig: Rig, prompts: Any, by_arena: bool) -> None:
    arena, num_layers = rig.arena if by_arena else None, rig.alone.facts.schema.num_layers
    writers = []
    for executor, where in ((rig.ranks, arena), (rig.alone, None)):
        first, second = sequence(prompts(24)), sequence(prompts(16, 3), 8)
        pair = Writer(3, where, present=(1,)), Writer(2, where, first_slot=4)
        pushes = [BlockPush(first.pages, pair[0], 0, 3, Listener()), BlockPush(second.pages, pair[1], 0, 2, Listener())]  # type: ignore[arg-type]
        executor.run([StepChunk(first, 0, 24), StepChunk(second, 0, 16)], pushes)
        await executor.pages.drained()
        writers.append(pair)
    for ours, expected in zip(*writers, strict=True):
        assert ours.blocks.keys() == expected.blocks.keys() and len(ours.blocks) == 2 * num_layers
        for place, block in ours.blocks.items():
            np.testing.assert_allclose(np.frombuffer(block, np.float32), np.frombuffer(expected.blocks[place], np.float32), atol=1e-4)


@pytest.mark.parametrize("by_arena", [True, False], ids=["arena", "arrays"])
async def test_blocks_that_one_process_wrote_go_into_the_ranks_pages_and_out_again(rig: Rig, by_arena: bool) -> None:
    schema, pages = rig.alone.facts.schema, [40, 47, 41]
    drawn = np.random.default_rng(5).standard_normal((3, schema.block_bytes // 4)).astype(np.float32).view(np.uint8)
    rows = drawn
    if by_arena:
        rig.arena.memory[8:11] = drawn
        rows = rig.arena.memory[8:11]
    width = schema.layer_bytes
    for layer, count in ((0, 2), (2, 1)):
        piece = SimpleNamespace(layer=layer, first_block=0, num_layers=count)
        piece.blocks = BlockRows([rows[:1, layer * width : (layer + count) * width], rows[1:, layer * width : (layer + count) * width]])
        await asyncio.wrap_future(rig.ranks.pages.load(pages, piece))
    writer = Writer(3, rig.arena if by_arena else None, first_slot=12)
    await asyncio.wrap_future(rig.ranks.pages.store(pages, writer, range(schema.num_layers)))  # type: ignore[arg-type]
    whole = [b"".join(writer.blocks[layer, block] for layer in range(schema.num_layers)) for block in range(3)]
    assert whole == [block.tobytes() for block in drawn]


async def stored(rig: Rig, page: int) -> np.ndarray:
    """fp32 [layer, k|v, head, token, head_dim] of a page of the ranks."""
    schema, writer = rig.alone.facts.schema, Writer(1)
    await asyncio.wrap_future(rig.ranks.pages.store([page], writer, range(schema.num_layers)))  # type: ignore[arg-type]
    layers = [np.frombuffer(writer.blocks[layer, 0], np.float32).reshape(schema.layer_shape) for layer in range(schema.num_layers)]
    return np.stack(layers)


async def put(rig: Rig, page: int, values: np.ndarray) -> None:
    rows = np.ascontiguousarray(values).view(np.uint8).reshape(1, -1)
    piece = SimpleNamespace(layer=0, first_block=0, num_layers=len(values), blocks=BlockRows([rows]))
    await asyncio.wrap_future(rig.ranks.pages.load([page], piece))


async def test_what_is_done_to_pages_is_done_to_every_ranks_heads(rig: Rig) -> None:
    schema = rig.alone.facts.schema
    values = np.random.default_rng(6).standard_normal((schema.num_layers, *schema.layer_shape)).astype(np.float32)
    await put(rig, 50, values)
    await asyncio.wrap_future(rig.ranks.pages.copy(50, 51))
    rig.ranks.pages.zero_tail(51, 3)
    cut = values.copy()
    cut[..., 3:, :] = 0
    assert (await stored(rig, 50) == values).all() and (await stored(rig, 51) == cut).all()


@pytest.mark.parametrize("head", [0, 1])
async def test_a_number_that_is_none_is_found_and_scrubbed_in_whichever_rank_has_it(rig: Rig, head: int) -> None:
    schema = rig.alone.facts.schema
    values = np.ones((schema.num_layers, *schema.layer_shape), dtype=np.float32)
    await put(rig, 52, values)
    values[1, 1, head, 2, 3] = np.nan
    await put(rig, 53, values)
    assert rig.ranks.find_not_finite([52, 53]) == [53]
    rig.ranks.scrub([53])
    assert rig.ranks.find_not_finite([52, 53]) == []
    assert np.count_nonzero(await stored(rig, 53)) == values.size - 1


def test_a_chunk_that_is_wrong_fails_alone_and_the_group_goes_on(rig: Rig, prompts: Any) -> None:
    one = sequence(prompts(16))
    with pytest.raises(StepFailed, match="is not within its 16 tokens"):
        rig.ranks.run([StepChunk(one, 0, 99)])
    assert len(rig.ranks.run([StepChunk(one, 0, 16)]).samples) == 1


async def test_an_arena_that_is_gone_is_one_that_the_ranks_do_not_know(rig: Rig, tmp_path: Path) -> None:
    schema = rig.alone.facts.schema
    arena, gone = Arena(tmp_path / "here", schema, 2), Arena(tmp_path / "gone", schema, 2)
    Path(gone.path).unlink()
    rig.ranks.pages.pin(gone)
    rig.ranks.pages.pin(arena)
    rig.ranks.pages.unpin(arena.memory)
    for one in (gone, arena):
        writer = Writer(1, one)
        await asyncio.wrap_future(rig.ranks.pages.store([50], writer, range(schema.num_layers)))  # type: ignore[arg-type]
        assert len(writer.blocks) == schema.num_layers and not one.memory.any(), "it was pushed by way of the buffer"


def test_a_model_that_the_ranks_can_not_divide_is_refused_before_any_starts(checkpoint: Any) -> None:
    with pytest.raises(ConfigError, match="num_kv_heads of the model is 2, which 4 does not divide; this model takes 1, 2"):
        load(checkpoint("llama3_gqa").folder, lambda _: None, size=4)


def test_a_rank_that_is_killed_ends_the_group_in_words_whether_a_step_runs_or_not(checkpoint: Any, prompts: Any) -> None:
    told: list[BaseException] = []
    crashed = threading.Event()
    ranks = load(checkpoint("llama3_gqa").folder, lambda error: (told.append(error), crashed.set()))
    (pid,) = ranks.pids
    try:
        ranks.run([StepChunk(sequence(prompts(16)), 0, 16)])
        os.kill(pid, signal.SIGKILL)
        assert crashed.wait(HANG_S), "its end is noticed without a step"
        assert isinstance(told[0], DeviceLost) and str(told[0]) == f"rank 1 of 2 (process {pid}) was killed by SIGKILL"
        with pytest.raises(DeviceLost, match="was killed by SIGKILL"):
            ranks.run([StepChunk(sequence(prompts(16)), 0, 16)])
        with pytest.raises(DeviceLost, match="was killed by SIGKILL"):
            ranks.find_not_finite([0])
        with pytest.raises(DeviceLost, match="was killed by SIGKILL"):
            ranks.pages.copy(0, 1).result(HANG_S)
    finally:
        ranks.close()


def test_a_rank_that_is_killed_in_a_step_ends_that_step(checkpoint: Any, prompts: Any) -> None:
    ranks = load(checkpoint("llama3_gqa").folder, lambda _: None)
    (pid,) = ranks.pids
    forward = ranks.engine.forward

    def killing(chunks: Any, **hooks: Any) -> Any:
        os.kill(pid, signal.SIGSTOP)  # it can't end its part of the step before it dies
        killer = threading.Thread(target=os.kill, args=(pid, signal.SIGKILL))
        killer.start()
        try:
            return forward(chunks, **hooks)
        finally:
            killer.join()

    ranks.engine.forward = killing
    try:
        with pytest.raises(DeviceLost, match=rf"^rank 1 of 2 \(process {pid}\) was killed by SIGKILL$"):
            ranks.run([StepChunk(sequence(prompts(16)), 0, 16)])
    finally:
        ranks.close()
