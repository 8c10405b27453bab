"""Ranks on threads, each with its part of the model: the tokens of one that holds all of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from halfmoon.engine.engine import Engine
from halfmoon.engine.model_config import ModelConfig
from halfmoon.engine.rank_group import Meeting
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.shard import WHOLE, Shard
from halfmoon.engine.weights import load_weights
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.errors import ConfigError
from halfmoon.protocol.sampling import SamplingParams

SIZE = 2


class Group:
    """Engines that are the ranks of one group; all run what is asked of it."""

    def __init__(self, folder: Path, meeting: Path, size: int, **options: Any) -> None:
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}") for rank in range(size)]
        made = ModelOptions(path=str(folder), device="cpu", block_size=8, **options)

        def load(rank: int) -> Engine:
            return Engine.load(made, kv_capacity_tokens=2048, num_threads=1, meeting=Meeting(Shard(rank, size), meeting))

        self.engines: list[Engine] = [future.result() for future in [t.submit(load, r) for r, t in enumerate(self._threads)]]

    def all(self, call: Callable[[Engine], Any]) -> list[Any]:
        futures = [thread.submit(call, engine) for thread, engine in zip(self._threads, self.engines, strict=True)]
        return [future.result() for future in futures]

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    made: list[Group] = []

    def make(folder: Path, size: int = SIZE, **options: Any) -> Group:
        made.append(Group(folder, tmp_path / f"meeting-{len(made)}", size, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def sequence(tokens: list[int], first_page: int = 3, **sampling: Any) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, **sampling})
    return Sequence(f"r{first_page}", list(tokens), len(tokens), params, pages=list(range(first_page, first_page + 16)))


def generate(engine: Engine, sequences: list[Sequence], chunk_len: int, num_tokens: int) -> list[list[int]]:
    """Chunks of prompts beside single decode tokens, until each sequence has num_tokens more."""
    while pending := [one for one in sequences if one.num_output_tokens < num_tokens]:
        chunks = [StepChunk(one, (at := one.num_computed_tokens), min(chunk_len, one.num_tokens - at)) for one in pending]
        ending = [chunk.sequence for chunk in chunks if chunk.is_last]
        logits = engine.forward(chunks)
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.start + chunk.num_tokens
        for one, sample in zip(ending, engine.sample(logits, ending) if ending else [], strict=True):
            one.token_ids.append(sample.token_id)
    return [one.token_ids[one.num_prompt_tokens :] for one in sequences]


@pytest.mark.parametrize("name", ["llama2_mha", "llama_biased", "llama_linear_tied", "qwen3_window", "qwen2", "sparse_qwen3_moe"])
def test_two_ranks_give_the_tokens_of_one_in_chunks_and_in_mixed_steps(
    name: str, group: Any, lab: Any, checkpoint: Any, prompts: Any
) -> None:
    folder = checkpoint(name).folder
    asked = [(prompts(31), {}), (prompts(9, 1), {"temperature": 0.9, "top_p": 0.9, "seed": 5}), (prompts(20, 2), {"presence_penalty": 1.5})]

    def run(engine: Engine) -> list[list[int]]:
        return generate(engine, [sequence(tokens, 3 + 16 * at, **sampling) for at, (tokens, sampling) in enumerate(asked)], 8, 12)

    alone = run(lab(folder).engine)
    assert group(folder).all(run) == [alone, alone]
    assert len({tuple(answer) for answer in alone}) == len(asked)


def test_the_logits_of_two_ranks_are_those_of_one_but_for_the_order_of_sums(group: Any, lab: Any, checkpoint: Any, prompts: Any) -> None:
    folder = checkpoint("llama_biased").folder
    one = [StepChunk(sequence(prompts(40)), 0, 40)]
    expected = lab(folder).engine.forward(one)
    for logits in group(folder).all(lambda engine: engine.forward(one)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_four_ranks_give_the_logits_of_one(group: Any, lab: Any, checkpoint: Any, prompts: Any) -> None:
    folder = checkpoint("llama2_mha").folder
    one = [StepChunk(sequence(prompts(20)), 0, 20)]
    expected = lab(folder).engine.forward(one)
    for logits in group(folder, size=4).all(lambda engine: engine.forward(one)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_each_rank_has_its_own_heads_of_the_same_pages(group: Any, lab: Any, checkpoint: Any, prompts: Any) -> None:
    folder = checkpoint("llama3_gqa").folder
    whole, ranks, chunks = lab(folder).engine, group(folder), [StepChunk(sequence(prompts(24)), 0, 24)]
    whole.forward(chunks)
    ranks.all(lambda engine: engine.forward(chunks))
    for rank, engine in enumerate(ranks.engines):
        num_heads = whole.schema.num_kv_heads // SIZE
        own = whole.cache.data[:, :, 3:6, rank * num_heads : (rank + 1) * num_heads]
        torch.testing.assert_close(engine.cache.data[:, :, 3:6], own, rtol=1e-4, atol=1e-4)
        assert engine.schema == whole.schema, "what others are told is the whole block"
        assert engine.weight_bytes < whole.weight_bytes * 0.6


def test_a_prompts_log_probabilities_are_those_of_one_rank(group: Any, lab: Any, checkpoint: Any, prompts: Any) -> None:
    folder = checkpoint("qwen2").folder

    def score(engine: Engine) -> Any:
        scored = sequence(prompts(20))
        scored.num_prompt_logprobs = 3
        return engine.forward_scored([StepChunk(scored, 0, 20)])[1][scored]

    expected = score(lab(folder).engine)
    for found in group(folder).all(score):
        torch.testing.assert_close(torch.from_numpy(found.logprobs), torch.from_numpy(expected.logprobs), rtol=1e-4, atol=1e-4)
        assert (found.ranks == expected.ranks).all() and (found.top_token_ids == expected.top_token_ids).all()


def test_random_weights_are_the_same_ones_however_they_are_divided(group: Any, lab: Any, checkpoint: Any, prompts: Any) -> None:
    folder = checkpoint("llama3_gqa").folder
    one = [StepChunk(sequence(prompts(16)), 0, 16)]
    expected = lab(folder, load_format="dummy").engine.forward(one)
    for logits in group(folder, load_format="dummy").all(lambda engine: engine.forward(one)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "what"), [(3, "num_kv_heads of the model is 2"), (4, "num_kv_heads of the model is 2")])
def test_a_model_that_can_not_be_divided_so_is_refused_with_what_it_takes(size: int, what: str, checkpoint: Any) -> None:
    config = ModelConfig.from_folder(checkpoint("llama3_gqa").folder)
    with pytest.raises(ConfigError, match=f"decode.tensor_parallel is {size}, and {what}, .* this model takes 1, 2$"):
        Shard(0, size).require_fits(config, "decode.tensor_parallel")


def test_ranks_agree_on_the_pages_that_the_poorest_has(tmp_path: Path, checkpoint: Any) -> None:
    options = ModelOptions(path=str(checkpoint("llama3_gqa").folder), device="cpu", block_size=8)
    found: dict[int, int] = {}

    def load(rank: int) -> None:
        meeting = Meeting(Shard(rank, SIZE), tmp_path / "meeting")
        found[rank] = Engine.load(options, kv_capacity_tokens=[800, 400][rank], num_threads=1, meeting=meeting).cache.num_pages

    threads = [threading.Thread(target=load, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 50, 1: 50}


@pytest.mark.parametrize("form", ["w4a16_channel", "w8a8_fp8", "w8a8_fp8_block"])
def test_the_ranks_parts_of_quantised_matrices_are_the_whole_ones(form: str, quantized: Any) -> None:
    folder = quantized(form) / "quantized"
    config = ModelConfig.from_folder(folder)

    def load(shard: Shard) -> Any:
        return load_weights(folder, config, torch.float32, torch.device("cpu"), None, config.quantization, shard)

    whole, ranks = load(WHOLE), [load(Shard(rank, 2)) for rank in range(2)]
    for index, layer in enumerate(whole.layers):
        parts = [rank.layers[index] for rank in ranks]
        for name in ("o", "down"):
            found = torch.cat([part.linears()[name].dequantized() for part in parts], dim=1)
            assert torch.equal(found, layer.linears()[name].dequantized())
        gates, ups = zip(*(part.mlp.gate_up.dequantized().chunk(2) for part in parts), strict=True)
        assert torch.equal(torch.cat([*gates, *ups]), layer.mlp.gate_up.dequantized())


def test_two_ranks_of_an_int4_checkpoint_give_the_tokens_of_one(group: Any, lab: Any, quantized: Any, prompts: Any) -> None:
    folder = quantized("w4a16_channel", "llama2_mha") / "quantized"

    def run(engine: Engine) -> list[list[int]]:
        return generate(engine, [sequence(prompts(31), 3)], 8, 12)

    alone = run(lab(folder).engine)
    assert group(folder).all(run) == [alone, alone]


def test_ranks_that_would_cut_a_group_of_a_scale_are_refused(quantized: Any) -> None:
    folder = quantized("awq", "llama2_mha") / "quantized"  # down: 96 columns in groups of 32
    config = ModelConfig.from_folder(folder)
    with pytest.raises(ConfigError, match=r"tensor_parallel is 2, which cuts model\.layers\.0\.mlp\.down_proj\.weight inside a group"):
        load_weights(folder, config, torch.float32, torch.device("cpu"), None, config.quantization, Shard(0, 2))
