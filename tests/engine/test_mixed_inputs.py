"""The buffers of mixed steps against the engine's plain way, on a CPU: same pages, same tokens, same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfmoon.engine.engine import Engine
from halfmoon.engine.mixed_inputs import HOST, MixedInputs, MixedSize, MixedStep, copy_tables, mixed_batch, split_step, views
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.sampling import SamplingParams

PAGE_SIZE = 8
NUM_ROWS = 64
SIZE = MixedSize(num_rows=NUM_ROWS, num_decodes=4, num_chunks=3, num_results=7, num_pages=16)


def sequence(num_tokens: int, number: int = 0, num_prompt_tokens: int | None = None, pages: list[int] | None = None) -> Sequence:
    tokens = torch.randint(3, 200, (num_tokens,), generator=torch.Generator().manual_seed(number)).tolist()
    params = SamplingParams(temperature=float(number % 2), seed=2**63 + number, top_k=number)
    return Sequence(f"r{number}", tokens, num_prompt_tokens or num_tokens, params, pages=pages or [])


class Graphless:
    """What MixedGraphs does around its graphs, on a CPU: fill, one copy, tables, the decoder on the columns."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.buffer = torch.zeros(SIZE.num_bytes, dtype=torch.uint8)
        self.staged = torch.zeros_like(self.buffer)
        self.table = torch.zeros((1 + SIZE.num_chunks + SIZE.num_decodes, SIZE.num_pages), dtype=torch.int32)
        self.results = torch.full((SIZE.num_results,), -7)
        # the last page is nobody's
        self.inputs = MixedInputs(self.buffer, SIZE, PAGE_SIZE, (engine.cache.num_pages - 1) * PAGE_SIZE)

    def run(self, chunks: list[StepChunk], num_rows: int, last_results: dict[Sequence, int] | None = None) -> torch.Tensor:
        step = split_step(chunks)
        assert SIZE.fits(step)
        width = self.inputs.fill(step, num_rows, SIZE.num_results, last_results or {})
        start = self.inputs.table_offset
        end = start + 4 * width * (len(step.chunks) + len(step.decodes))
        self.staged[:end] = self.buffer[:end]
        if width:
            copy_tables(self.staged[start:end].view(torch.int32), step, width, SIZE, self.table)
        batch = mixed_batch(views(SIZE, self.staged), self.table, self.results, SIZE, num_rows, 128)
        with torch.inference_mode():
            hidden, residual = self.engine._decoder.layers(batch, self.engine.cache)
            return self.engine._decoder.head(hidden[batch.last_rows], residual[batch.last_rows])[: len(step.sampled)]


@pytest.fixture(scope="module")
def engine(checkpoint: Any) -> Engine:
    options = ModelOptions(path=str(checkpoint("mistral_window").folder), device="cpu", block_size=PAGE_SIZE)
    return Engine.load(options, kv_capacity_tokens=60 * PAGE_SIZE, num_threads=1)


# prompt lengths, and the chunk of each prompt that a step computes; 0: the sequence decodes already
steps = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=7)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(plan=steps, spare=st.integers(0, 9), seed=st.integers(0, 99))
def test_any_mixture_gives_the_logits_and_the_pages_of_the_plain_way(engine: Engine, plan: Any, spare: int, seed: int) -> None:
    found: list[list[torch.Tensor]] = []
    for mixed in (False, True):
        engine.cache.data.zero_()
        allocator = PageAllocator(engine.cache.num_pages - 1)
        batch = [sequence(length, 31 * seed + row, pages=allocator.allocate(7)) for row, (length, _) in enumerate(plan)]
        for one, (_, chunk_len) in zip(batch, plan, strict=True):
            if chunk_len == 0 and one.num_tokens > 1:
                engine.forward([StepChunk(one, 0, one.num_tokens - 1)])
                one.num_computed_tokens = one.num_tokens - 1
        runner, logits = Graphless(engine), []
        for _ in range(4):
            chunks = [
                StepChunk(one, one.num_computed_tokens, max(1, min(chunk_len, one.num_tokens - one.num_computed_tokens)))
                for one, (_, chunk_len) in zip(batch, plan, strict=True)
            ]
            step = split_step(chunks)
            chunks = chunks if SIZE.fits(step) and step.num_rows + spare <= NUM_ROWS else chunks[:1]
            step = split_step(chunks)
            logits.append(runner.run(chunks, step.num_rows + spare) if mixed else engine.forward(chunks))
            for chunk in chunks:
                chunk.sequence.num_computed_tokens = chunk.start + chunk.num_tokens
            for chunk, row in zip((chunk for chunk, _ in step.sampled), logits[-1], strict=True):
                chunk.sequence.token_ids.append(int(row.argmax()))
        kv = torch.cat([engine.cache.data[:, :, one.pages].flatten() for one in batch])
        found.append([*logits, kv])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_a_token_that_the_host_does_not_know_comes_from_the_results_of_the_step_before(engine: Engine) -> None:
    logits = []
    for known in (True, False):
        pages = PageAllocator(engine.cache.num_pages - 1)
        first, other, prompt = (sequence(length, length, pages=pages.allocate(4)) for length in (9, 5, 12))
        engine.forward([StepChunk(first, 0, 9), StepChunk(other, 0, 4)])
        runner = Graphless(engine)
        if known:
            first.token_ids.append(77)
        else:
            runner.results[4] = 77
        chunks = [StepChunk(prompt, 0, 12), StepChunk(first, 9, 1), StepChunk(other, 4, 1)]
        logits.append(runner.run(chunks, 20, {first: 4}))
        assert len(logits[-1]) == 3, "a row for each that samples, in the order of the chunks"
    torch.testing.assert_close(logits[1], logits[0])


def test_sampling_columns_and_last_rows_follow_the_order_in_which_the_step_was_given() -> None:
    buffer = torch.zeros(SIZE.num_bytes, dtype=torch.uint8)
    inputs, columns = MixedInputs(buffer, SIZE, PAGE_SIZE, 999), views(SIZE, buffer)
    prompt, decoding, begun = sequence(10, 3, pages=[1, 2]), sequence(6, 4, 4, pages=[3]), sequence(30, 5, pages=[4, 5, 6, 7])
    step = split_step([StepChunk(begun, 8, 8), StepChunk(prompt, 4, 6), StepChunk(decoding, 5, 1)])
    inputs.fill(step, 20, 4, {})
    assert [chunk.sequence for chunk, _ in step.sampled] == [prompt, decoding]
    assert columns["last_rows"].tolist() == [14, 0, 0, 0, 0, 0, 0], "behind the decode row and the other prompt's eight; the decode row"
    assert columns["top_ks"][:4].tolist() == [3, 4, 0, 0] and columns["top_ps"][:4].tolist() == [1.0] * 4
    assert columns["indices"][:2].tolist() == [0, 2], "the prompt's first token, and the third of the answer"
    assert columns["seeds"][:2].tolist() == [-(2**63) + 3, -(2**63) + 4]
    assert columns["cu_seqlens"].tolist() == [0, 1, 9, 15, 15] and columns["chunk_lens"].tolist() == [0, 16, 10, 0]
    assert columns["decode_lens"].tolist() == [6, 0, 0, 0]
    assert columns["slot_mapping"][:20].tolist() == [29, *range(40, 48), *range(12, 16), 16, 17, *[999] * 5]
    assert columns["sources"][:20].tolist() == [HOST] * 20 and inputs.draws


def test_tables_are_sent_again_only_when_they_changed() -> None:
    buffer = torch.zeros(SIZE.num_bytes, dtype=torch.uint8)
    inputs = MixedInputs(buffer, SIZE, PAGE_SIZE, 999)
    prompt, decoding = sequence(40, 1, pages=[1, 2, 3, 4, 5]), sequence(6, 2, 4, pages=[7])

    def both(start: int, at: int) -> MixedStep:
        return split_step([StepChunk(prompt, start, 8), StepChunk(decoding, at, 1)])

    assert inputs.fill(both(16, 5), 16, 1, {}) == 3
    assert inputs.fill(both(16, 5), 16, 1, {}) == 0
    assert inputs.fill(both(24, 5), 16, 1, {}) == 4, "the prompt reached another page"
    decoding.token_ids += [5, 5, 5]
    decoding.pages.append(9)
    assert inputs.fill(both(24, 8), 16, 1, {}) == 4, "the answer got one"
    assert inputs.fill(split_step([StepChunk(decoding, 8, 1)]), 16, 1, {}) == 2, "the rows are another's"


def test_what_is_too_much_for_the_buffers_does_not_fit() -> None:
    def fits(*chunks: StepChunk) -> bool:
        return SIZE.fits(split_step(chunks))

    long, prompts = sequence(80, 1), [sequence(4, number) for number in range(8)]
    assert fits(StepChunk(long, 0, 64)) and not fits(StepChunk(long, 0, 65))
    whole, last = [StepChunk(one, 0, 4) for one in prompts], [StepChunk(one, 3, 1) for one in prompts]
    assert fits(*whole[:3]) and not fits(*whole[:4])
    assert fits(*last[:4]) and not fits(*last[:5])
