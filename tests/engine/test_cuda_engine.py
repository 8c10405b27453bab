"""The engine on CUDA against the same weights in fp32 on the CPU; decode graphs against the way without them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfmoon.engine.engine import Engine
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sampler import sample
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.step_graphs import InFlight
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.sampling import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"), pytest.mark.timeout(600)]

VOCAB_SIZE = 1000
PAGE_SIZE = 64
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
MODELS = {
    "llama-hd64": LLAMA,
    "llama-hd128": {**LLAMA, "head_dim": 128},
    "qwen3": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
    "mistral-window": {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 100},
}


def load(folder: Path, device: str, dtype: str, max_decode_batch: int = 0) -> Engine:
    options = ModelOptions(path=str(folder), device=device, dtype=dtype, load_format="dummy", block_size=PAGE_SIZE)  # type: ignore[arg-type]
    return Engine.load(options, kv_capacity_tokens=16384, num_threads=4, max_decode_batch=max_decode_batch)


def copy_weights(source: Engine, target: Engine) -> None:
    """Rounded as source has them, and larger than a dummy's, so that the tokens' logits are far apart."""
    for tensor, other in zip(source._decoder.weights.tensors(), target._decoder.weights.tensors(), strict=True):
        if tensor.dim() == 2:
            tensor.mul_(3)
        other.copy_(tensor)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Engine, Engine]]:
    """engines(model, dtype): on CUDA with graphs of up to 24 sequences, and in fp32 on the CPU, with the same weights."""
    made: dict[tuple[str, str], tuple[Engine, Engine]] = {}

    def make(model: str, dtype: str) -> tuple[Engine, Engine]:
        if (model, dtype) not in made:
            folder = tmp_path_factory.mktemp(model)
            (folder / "config.json").write_text(json.dumps(MODELS[model]))
            made[model, dtype] = (load(folder, "cuda", dtype, 24), load(folder, "cpu", "float32"))
            copy_weights(*made[model, dtype])
        return made[model, dtype]

    return make


@pytest.fixture(scope="module")
def small(engines: Callable[[str, str], tuple[Engine, Engine]]) -> Engine:
    return engines("llama-hd128", "bfloat16")[0]


class Pages:
    """Sequences with pages of their own; the first few pages stay unused."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.allocator = PageAllocator(engine.cache.num_pages)
        self.allocator.allocate(3)

    def sequence(self, num_tokens: int, number: int = 0, extra: int = 64, **sampling: Any) -> Sequence:
        tokens = torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(number)).tolist()
        pages = self.allocator.allocate(-(-(num_tokens + extra) // PAGE_SIZE))
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, "ignore_eos": True, **sampling})
        return Sequence(f"r{number}", tokens, num_tokens, params, pages=pages)


def prefill(engine: Engine, batch: Iterable[Sequence]) -> None:
    """All but the last token, so that a decode step comes next."""
    for sequence in batch:
        engine.forward([StepChunk(sequence, 0, sequence.num_tokens - 1)])


def next_chunks(batch: Iterable[Sequence]) -> list[StepChunk]:
    return [StepChunk(sequence, sequence.num_tokens - 1, 1) for sequence in batch]


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return float((out.cpu().float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 3e-2), ("float16", 1e-2), ("float32", 1e-4)])
def test_logits_of_chunks_and_decode_steps_are_the_cpus(engines, model, dtype, limit):
    """Whole prompts and chunks, alone and together, then six decode steps with the CPU's tokens."""
    both = engines(model, dtype)
    batches = []
    for engine in both:
        pages = Pages(engine)
        batches.append([pages.sequence(length, number) for number, length in enumerate((300, 64, 131, 517))])
    for spans in ((0, 40), (40, 10**6), *((None, 1),) * 6):
        logits = []
        for engine, batch in zip(both, batches, strict=True):
            starts = [sequence.num_tokens - 1 if spans[0] is None else spans[0] for sequence in batch]
            chunks = [StepChunk(one, start, min(spans[1], one.num_tokens - start)) for one, start in zip(batch, starts, strict=True)]
            logits.append(engine.forward(chunks))
        assert logits[0].shape == logits[1].shape
        if len(logits[1]):
            assert error(logits[0], logits[1]) < limit
            for row, token in enumerate(logits[1].argmax(dim=-1).tolist()):
                for batch in batches:
                    batch[row].token_ids.append(token)


@pytest.mark.parametrize("num_top", [0, 5])
def test_prompts_log_probabilities_in_fp32_are_the_cpus(engines, num_top):
    """In chunks, beside a prompt that is not scored and a decode row. No graph takes such a step."""
    found = []
    for engine in engines("llama-hd64", "float32"):
        pages = Pages(engine)
        scoring, plain, running = (pages.sequence(length, number) for number, length in enumerate((517, 131, 64)))
        prefill(engine, [running])
        scoring.num_prompt_logprobs, scored = num_top, []
        for start, end in ((0, 300), (300, 517)):
            chunks = [*next_chunks([running]), StepChunk(scoring, start, end - start), StepChunk(plain, 0, 131)]
            assert engine.launch(chunks) is None
            logits, by_sequence = engine.forward_scored(chunks)
            assert len(logits) == sum(chunk.is_last for chunk in chunks) and set(by_sequence) == {scoring}
            scored.append(by_sequence[scoring])
            scoring.num_scored_tokens = scored[-1].start + len(scored[-1].logprobs)
        assert [(one.start, len(one.logprobs)) for one in scored] == [(1, 300), (301, 216)]
        found.append(scored)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours.logprobs), torch.from_numpy(theirs.logprobs), atol=1e-3, rtol=0)
        torch.testing.assert_close(torch.from_numpy(ours.top_logprobs), torch.from_numpy(theirs.top_logprobs), atol=1e-3, rtol=0)


def test_greedy_tokens_in_fp32_are_the_cpus(engines):
    """Sequences of different lengths that join late and leave early, so that rows move and batch sizes change."""
    histories = []
    for engine in engines("llama-hd64", "float32"):
        pages = Pages(engine)
        waiting = [pages.sequence(length, number) for number, length in enumerate((62, 1, 300, 127, 64, 5, 190))]
        prefill(engine, [sequence for sequence in waiting if sequence.num_tokens > 1])
        running, finished = [], []
        while waiting or running:
            running += [waiting.pop(0) for _ in range(min(2, len(waiting)))]
            for sequence, token in zip(running, engine.sample(engine.forward(next_chunks(running)), running), strict=True):
                sequence.token_ids.append(token.token_id)
            finished += [one for one in running if one.num_output_tokens >= 6 + one.num_prompt_tokens % 5]
            running = [one for one in running if one not in finished]
        histories.append({one.request_id: one.token_ids for one in finished})
    assert histories[0] == histories[1]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13, 24])
def test_a_graph_computes_what_the_way_without_one_does(small, count, monkeypatch):
    pages = Pages(small)
    batch = [pages.sequence(30 + 37 * row % 400, row) for row in range(count)]
    prefill(small, batch)
    logits = small.forward(next_chunks(batch))
    assert small._graphs is not None and logits is small._graphs._logits
    found, tokens = logits.clone(), [one.token_id for one in small.sample(logits, batch)]
    monkeypatch.setattr(small, "_graphs", None)
    assert error(found, small.forward(next_chunks(batch)).cpu()) < 1e-2
    assert tokens == found.argmax(dim=-1).tolist()


def test_padding_rows_write_to_no_page_that_may_be_handed_out(small):
    pages = Pages(small)
    batch = [pages.sequence(70 + row, row) for row in range(3)]
    prefill(small, batch)
    before = small.cache.data.clone()
    small.forward(next_chunks(batch))
    changed = (small.cache.data != before).any(dim=(0, 1, 3, 5)).nonzero().tolist()
    own = {(one.pages[(one.num_tokens - 1) // PAGE_SIZE], (one.num_tokens - 1) % PAGE_SIZE) for one in batch}
    assert own == {(page, offset) for page, offset in changed if page < small.cache.num_pages}


def test_tokens_drawn_in_a_graph_are_those_drawn_from_its_logits(small):
    pages = Pages(small)
    options: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.5, "top_k": 100, "top_p": 0.9},
    ]
    batch = [pages.sequence(20 + row, row, seed=2**63 + row, **chosen) for row, chosen in enumerate(options)]
    prefill(small, batch)
    drawn = set()
    for _ in range(12):
        logits = small.forward(next_chunks(batch))
        found = small.sample(logits, batch)
        assert found == sample(logits.clone(), batch, frozenset()) and found == small.sample(logits.clone(), batch)
        for sequence, token in zip(batch, found, strict=True):
            sequence.token_ids.append(token.token_id)
        drawn.add(found[0].token_id)
    assert len(drawn) > 3


def test_what_a_graph_can_not_draw_is_drawn_from_its_logits(small):
    """Penalties, bias, bans and logprobs, each beside a greedy neighbour."""
    pages = Pages(small)
    for chosen in ({"presence_penalty": 1.5}, {"logit_bias": {7: 90.0}}, {"min_tokens": 5, "ignore_eos": False}, {"num_logprobs": 3}):
        batch = [pages.sequence(50, 1, extra=8, **chosen), pages.sequence(50, 2, extra=8)]
        prefill(small, batch)
        logits = small.forward(next_chunks(batch))
        found = small.sample(logits, batch)
        assert found == sample(logits.clone(), batch, small.config.eos_token_ids)
        assert found[0].token_id == 7 or "logit_bias" not in chosen
        assert len(found[0].top) == (3 if "num_logprobs" in chosen else 0)


def test_a_step_that_no_graph_holds_runs_without_one(small):
    pages = Pages(small)
    batch = [pages.sequence(20, row, extra=4) for row in range(25)]
    prefill(small, batch)
    assert small._graphs is not None
    for chunks in (next_chunks(batch), [StepChunk(one, 17, 3) for one in batch[:17]]):
        assert small._graphs.run(chunks) is None
        assert len(small.forward(chunks)) == sum(chunk.is_last for chunk in chunks)
    seen: list[int] = []
    small.forward(next_chunks(batch[:2]), after_layer=seen.append)
    assert seen == [0, 1, 2]


class Worker:
    """Runs steps as a decode worker does: the next is launched before this one's tokens are read."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.running: tuple[list[Sequence], InFlight] | None = None

    def launch(self, batch: list[Sequence]) -> None:
        on_their_way = self.running[0] if self.running else []
        chunks = [StepChunk(one, one.num_tokens - 1 + (one in on_their_way), 1) for one in batch]
        for sequence, start, _ in chunks:
            if start == len(sequence.pages) * PAGE_SIZE:
                sequence.pages += self.pages.allocator.allocate(1)
        launched = self.pages.engine.launch(chunks)
        assert launched is not None
        self.read()
        self.running = (batch, launched)

    def read(self) -> None:
        if self.running is not None:
            for sequence, token in zip(self.running[0], self.running[1].tokens(), strict=True):
                sequence.token_ids.append(token)
        self.running = None

    def in_turn(self, batch: list[Sequence]) -> None:
        self.read()
        for sequence in batch:
            if sequence.num_tokens > len(sequence.pages) * PAGE_SIZE:
                sequence.pages += self.pages.allocator.allocate(1)
        for sequence, token in zip(batch, self.pages.engine.sample(self.pages.engine.forward(next_chunks(batch)), batch), strict=True):
            sequence.token_ids.append(token.token_id)


# which sequences make each step: they join, leave, swap rows and come back, and the graphs' sizes change with them
LENGTHS = (62, 59, 126, 188, 63, 64)
STEPS = ([0], [0], [0, 1], [1, 0], [1, 0, 2], [2, 1, 0, 3, 4], [2, 0, 3, 4], [5, 2, 0, 3, 4], [5, 0], [1, 5, 0], [1], *[[1, 2, 3]] * 4)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("in_turn", [(), (3, 6, 7, 12)])
def test_steps_launched_ahead_give_the_tokens_of_steps_in_turn(small, drawn, in_turn):
    """Every sequence crosses the end of a page, where it gets its next page only when it needs it."""
    pages, histories = Pages(small), []
    for ahead in (False, True):
        batch = []
        for row, length in enumerate(LENGTHS):
            sampling = {"temperature": 1.2, "seed": 2**63 + row, "top_k": 50 * (row % 3), "top_p": 0.95} if drawn and row % 3 else {}
            batch.append(pages.sequence(length, row, extra=0, **sampling))
        prefill(small, batch)
        worker = Worker(pages)
        for number, rows in enumerate(STEPS):
            step = worker.launch if ahead and number not in in_turn else worker.in_turn
            step([batch[row] for row in rows])
        worker.read()
        histories.append([one.token_ids for one in batch])
        assert all(len(one.pages) == 1 + -(-one.num_prompt_tokens // PAGE_SIZE) for one in batch), "each crossed one end of a page"
        assert [one.num_output_tokens for one in batch] == [sum(row in rows for rows in STEPS) for row in range(len(batch))]
    assert histories[0] == histories[1]


def test_tokens_can_be_read_in_any_order_and_long_after(small):
    """Five steps of other sequences each are launched, and one runs in turn, before any is read."""
    pages = Pages(small)
    batches = [[pages.sequence(40 + row, 7 * number + row) for row in range(1 + number)] for number in range(5)]
    prefill(small, [one for batch in batches for one in batch])
    wanted = [[token.token_id for token in small.sample(small.forward(next_chunks(batch)), batch)] for batch in batches]
    launched = [step for batch in batches if (step := small.launch(next_chunks(batch))) is not None]
    small.sample(small.forward(next_chunks(batches[0])), batches[0])
    assert [one.tokens() for one in reversed(launched)] == wanted[::-1]
    assert [one.tokens() for one in launched] == wanted


def test_what_can_not_be_launched_is_refused_and_runs_the_other_way(small):
    pages = Pages(small)
    for chosen in ({"presence_penalty": 1.5}, {"logit_bias": {7: 9.0}}, {"min_tokens": 5, "ignore_eos": False}, {"num_logprobs": 3}):
        batch = [pages.sequence(50, 1, extra=8), pages.sequence(50, 2, extra=8, **chosen)]
        prefill(small, batch)
        assert small.launch(next_chunks(batch)) is None
        logits = small.forward(next_chunks(batch))
        assert small.sample(logits, batch) == sample(logits.clone(), batch, small.config.eos_token_ids)
    pages = Pages(small)
    one, other = pages.sequence(63, 1, extra=1), pages.sequence(30, 2)
    prefill(small, [one, other])
    for chunks in ([], [StepChunk(one, 60, 4)], [StepChunk(one, 63, 1)], next_chunks([other] * 25)):
        assert small.launch(chunks) is None, "too many, or a token that no step gives"
    first = small.launch(next_chunks([one]))
    assert first is not None
    assert small.launch([StepChunk(other, 30, 1)]) is None, "the step before gives it none"
    behind = small.launch([StepChunk(one, 63, 1), *next_chunks([other])])
    assert behind is not None and len(behind.tokens()) == 2
    assert small.launch([StepChunk(one, 64, 1)]) is None, "two of its tokens are on their way"
    one.token_ids += first.tokens()
    assert small.launch([StepChunk(one, 64, 1)]) is None, "there is no page for it"
    one.pages += pages.allocator.allocate(1)
    assert small.launch([StepChunk(one, 64, 1)]) is not None
    small.forward(next_chunks([one]))
    assert small.launch([StepChunk(one, 64, 1)]) is None, "what forward's logits give is for sample to say"


def test_tokens_before_min_tokens_are_left_to_sample(small):
    pages = Pages(small)
    sequence = pages.sequence(50, 1, min_tokens=2, ignore_eos=False)
    prefill(small, [sequence])
    worker = Worker(pages)
    for _ in range(2):
        assert small.launch(next_chunks([sequence])) is None
        worker.in_turn([sequence])
    for _ in range(3):
        worker.launch([sequence])
    worker.read()
    assert sequence.num_output_tokens == 5


def test_no_request_waits_for_a_kernel_to_be_compiled(small):
    """Batches of many shapes after the load: Triton compiles none of them anew."""
    triton = pytest.importorskip("triton")
    compiled: list[str] = []

    def saw(**found: Any) -> None:
        compiled.append(str(found.get("repr", found)))

    triton.knobs.runtime.jit_cache_hook = saw
    try:
        pages = Pages(small)
        for length in (1, 2, 7, 16, 17, 33, 65, 128, 129, 500, 1024, 1500):
            one, other = pages.sequence(length, 1, extra=1), pages.sequence(max(1, length // 2), 2, extra=1, temperature=0.9, top_p=0.9)
            for chunks in ([StepChunk(one, 0, length)], [StepChunk(one, 0, length), StepChunk(other, 0, other.num_tokens)]):
                small.sample(small.forward(chunks), [chunk.sequence for chunk in chunks])
            pages = Pages(small)
        batch = [pages.sequence(20, row, extra=4, temperature=float(row % 2)) for row in range(20)]
        for count in (1, 2, 3, 16, 20):
            chunks = [StepChunk(one, 0, 20) for one in batch[:count]]
            small.sample(small.forward(chunks), batch[:count])
            small.sample(small.forward(next_chunks(batch[:count])), batch[:count])
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    assert compiled == []
