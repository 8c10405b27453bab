"""Steps of decode tokens and chunks as CUDA graphs, against the engine's way without graphs and against steps in turn."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfmoon.engine.engine import Engine
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sampler import sample
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.step_graphs import InFlight, StepGraphs
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.sampling import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"), pytest.mark.timeout(600)]

VOCAB_SIZE = 1000
PAGE_SIZE = 64
LIMIT = 3e-2  # both are bf16, and each as far from exact numbers
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
VARIANTS = {"llama": MODEL, "window": {**MODEL, "architectures": ["MistralForCausalLM"], "sliding_window": 300}}


@pytest.fixture(scope="module", params=VARIANTS)
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(VARIANTS[request.param]))
    options = ModelOptions(path=str(folder), device="cuda", dtype="bfloat16", load_format="dummy", block_size=PAGE_SIZE)
    made = Engine.load(options, kv_capacity_tokens=80_000, num_threads=4, max_decode_batch=24)
    for layer in made._decoder.weights.layers:
        for weight in (linear.weight for linear in layer.linears().values()):
            weight.mul_(3)  # so that the tokens' logits are far apart
    made._decoder.weights.lm_head.mul_(3)
    yield made
    torch.cuda.empty_cache()


class Pages:
    def __init__(self, engine: Engine) -> None:
        self.allocator = PageAllocator(engine.cache.num_pages)
        self.allocator.allocate(5)
        random.Random(7).shuffle(self.allocator._free)  # as after hours: neighbours in a sequence are not neighbours in memory

    def sequence(self, num_tokens: int, number: int, extra: int = 64, **sampling: Any) -> Sequence:
        tokens = torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(number)).tolist()
        pages = self.allocator.allocate(-(-(num_tokens + extra) // PAGE_SIZE))
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, "ignore_eos": True, **sampling})
        return Sequence(f"r{number}", tokens, num_tokens, params, pages=pages)


def prefill(engine: Engine, sequence: Sequence, num_tokens: int) -> None:
    for start in range(0, num_tokens, 1024):
        engine.forward([StepChunk(sequence, start, min(1024, num_tokens - start))])


def last(sequence: Sequence) -> StepChunk:
    return StepChunk(sequence, sequence.num_tokens - 1, 1)


def graphs(engine: Engine) -> StepGraphs:
    assert engine._graphs is not None
    return engine._graphs


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return float((out.float() - reference.float()).norm() / reference.float().norm())


CASES = {
    "a chunk of 512 behind 3,000 tokens, beside decodes": ([(4000, 3000, 512)], [1500, 90, 64, 3000, 5]),
    "whole prompts beside decodes": ([(40, 0, 40), (200, 0, 200), (63, 0, 63), (1, 0, 1)], [700, 65]),
    "prompts alone": ([(300, 0, 300), (17, 0, 17)], []),
    "a prompt's middle alone, nothing sampled": ([(900, 256, 300)], []),
    "one row of a prompt beside 24 decodes": ([(900, 256, 1)], list(range(50, 1250, 50))),
    "16 prompts": ([(30 + 7 * n, 0, 30 + 7 * n) for n in range(16)], [40]),
    "few queries over many keys": ([(6000, 5900, 100)], [6000, 33]),
    "more rows than a graph holds": ([(4000, 0, 3000)], [500, 77]),
    "a row short of a graph's size, and its size": ([(2000, 0, 503)], [70] * 9),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mixed_step_computes_what_the_way_without_graphs_does(engine: Engine, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_specs, decode_lens = CASES[case]
    pages = Pages(engine)
    prompts = [(pages.sequence(length, 100 + number), start, size) for number, (length, start, size) in enumerate(chunk_specs)]
    decodes = [pages.sequence(length, number) for number, length in enumerate(decode_lens)]
    for sequence, start, _ in prompts:
        prefill(engine, sequence, start)
    for sequence in decodes:
        prefill(engine, sequence, sequence.num_tokens - 1)
    chunks = [StepChunk(sequence, start, size) for sequence, start, size in prompts]
    chunks = [*chunks[:1], *map(last, decodes), *chunks[1:]]
    owned = [page for sequence in (*decodes, *(one for one, _, _ in prompts)) for page in sequence.pages]
    before = engine.cache.data.clone()
    logits = engine.forward(chunks)
    assert logits is graphs(engine)._logits, "no graph took it"
    sampled = [chunk.sequence for chunk in chunks if chunk.is_last]
    found, drawn, cache = logits.clone(), engine.sample(logits, sampled), engine.cache.data[:, :, owned].clone()
    others = [page for page in range(engine.cache.num_pages) if page not in owned]
    assert torch.equal(engine.cache.data[:, :, others], before[:, :, others]), "it wrote to a page of nobody's"
    engine.cache.data.copy_(before)
    monkeypatch.setattr(engine, "_graphs", None)
    wanted = engine.forward(chunks)
    assert found.shape == wanted.shape == (len(sampled), VOCAB_SIZE)
    assert len(sampled) == 0 or error(found, wanted) < LIMIT
    assert [one.token_id for one in drawn] == found.argmax(dim=-1).tolist()
    assert error(cache, engine.cache.data[:, :, owned]) < LIMIT


def test_a_layer_is_told_of_when_its_keys_and_values_stand_in_the_pages(engine: Engine) -> None:
    """Told while the graph still runs: what is copied then, in the stream that it is told in, is the layer's of this step."""
    pages = Pages(engine)
    for size in (700, 2000):
        one = pages.sequence(size, size)
        engine.cache.data[:, :, one.pages] = 0
        copies: list[torch.Tensor] = []

        def copy(layer: int, one: Sequence = one, copies: list[torch.Tensor] = copies) -> None:
            copies.append(engine.cache.layer(layer)[:, one.pages].clone())

        for _ in range(3):  # another step's events must not be taken for this one's
            copies.clear()
            engine.cache.data[:, :, one.pages] = 0
            torch.cuda.synchronize()
            engine.forward([StepChunk(one, 0, size)], after_layer=copy)
            torch.cuda.synchronize()
            for layer, seen in enumerate(copies):
                assert torch.equal(seen, engine.cache.layer(layer)[:, one.pages]) and seen.any()
        assert len(copies) == 3


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 2**63 + 5},
    {"temperature": 0.7, "top_k": 5, "seed": 3},
    {"temperature": 2.0, "top_p": 0.8, "min_p": 0.01, "seed": 4},
]


def test_tokens_drawn_in_a_mixed_step_are_those_drawn_from_its_logits(engine: Engine) -> None:
    pages = Pages(engine)
    batch = [pages.sequence(20 + row, row, **chosen) for row, chosen in enumerate(SAMPLING)]
    prompt = pages.sequence(150, 9, **SAMPLING[1])
    for sequence in batch:
        prefill(engine, sequence, sequence.num_tokens - 1)
    chunks = [last(batch[0]), StepChunk(prompt, 0, 150), *map(last, batch[1:])]
    sampled = [chunk.sequence for chunk in chunks]
    logits = engine.forward(chunks)
    assert engine.sample(logits, sampled) == sample(logits.clone(), sampled, frozenset())


class Runner:
    """Runs a plan of steps, in turn or each launched before the tokens of the one before are read."""

    def __init__(self, engine: Engine, ahead: bool) -> None:
        self.engine = engine
        self.ahead = ahead
        self.pending: tuple[list[Sequence], InFlight] | None = None

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        """Chunk lengths of prompts; 0: the next token."""
        coming = self.pending[0] if self.pending else []
        chunks = [
            StepChunk(one, one.num_tokens - 1 + (one in coming), 1) if size == 0 else StepChunk(one, one.num_computed_tokens, size)
            for one, size in work
        ]
        sampled = [chunk.sequence for chunk in chunks if chunk.start + chunk.num_tokens >= chunk.sequence.num_tokens]
        for sequence, size in work:
            sequence.num_computed_tokens += size
        if self.ahead:
            launched = self.engine.launch(chunks)
            assert launched is not None
            self.read()
            self.pending = (sampled, launched)
        else:
            for sequence, token in zip(sampled, self.engine.sample(self.engine.forward(chunks), sampled), strict=True):
                sequence.token_ids.append(token.token_id)

    def read(self) -> None:
        if self.pending is not None:
            for sequence, token in zip(self.pending[0], self.pending[1].tokens(), strict=True):
                sequence.token_ids.append(token)
        self.pending = None


@pytest.mark.parametrize("seed", range(6))
def test_steps_launched_ahead_give_the_tokens_of_steps_in_turn(engine: Engine, seed: int) -> None:
    """Prompts come in at any time, are computed in chunks beside the others' tokens, and decode from the very next step on."""
    histories = []
    for ahead in (False, True):
        rng, pages, runner = random.Random(seed), Pages(engine), Runner(engine, ahead)
        waiting = [pages.sequence(rng.randrange(1, 900), number, **SAMPLING[number % 4]) for number in range(7)]
        batch, active = list(waiting), []
        for _ in range(40):
            if waiting and rng.random() < 0.4:
                active.append(waiting.pop(0))
            work: list[tuple[Sequence, int]] = []
            for one in active:
                left = one.num_prompt_tokens - one.num_computed_tokens
                if left > 0 and rng.random() < 0.7:
                    work.append((one, min(left, rng.choice((1, 60, 64, 300)))))
                elif left <= 0 and rng.random() < 0.9:
                    work.append((one, 0))
            rng.shuffle(work)
            if work:
                runner.step(work)
        runner.read()
        histories.append([one.token_ids for one in batch])
    assert histories[0] == histories[1]
    assert sum(len(tokens) for tokens in histories[0]) > 60


def test_rows_and_pages_that_a_step_cannot_have_are_refused(engine: Engine) -> None:
    pages = Pages(engine)
    prompts = [pages.sequence(10, number) for number in range(17)]
    assert engine.launch([StepChunk(one, 0, 10) for one in prompts]) is None, "more prompts than the buffers hold"
    assert engine.launch([StepChunk(one, 0, 10) for one in prompts[:16]]) is not None
    short = pages.sequence(64, 50, extra=0)
    short.token_ids.append(5)
    assert engine.launch([StepChunk(short, 0, 65)]) is None, "its pages hold 64"
    assert engine.launch([StepChunk(prompts[0], 5, 7)]) is None, "it has ten tokens"
