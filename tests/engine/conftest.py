"""Tiny checkpoints that transformers itself writes, engines on them, and a loop that runs them as a worker would."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from halfmoon.engine.engine import Engine
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.sampling import SamplingParams

VOCAB_SIZE = 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # wide, so that attention patterns are sharp and a wrong mask or position shows
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (transformers' configuration class, what differs from COMMON)
VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama2_mha": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama3_gqa": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear_tied": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama_biased": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "mistral_window": (transformers.MistralConfig, {"sliding_window": 11}),
    "mistral_full": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "qwen2": (transformers.Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2_window": (transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}),
    "qwen25_tied": (transformers.Qwen2Config, {"tie_word_embeddings": True, "sliding_window": 13, "num_key_value_heads": 1}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 40, "tie_word_embeddings": True}),
    "qwen3_window": (
        transformers.Qwen3Config,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    model: Any  # transformers' own, fp32, eager attention


@dataclass
class Lab:
    """An engine and the bookkeeping that a worker has around it."""

    engine: Engine
    allocator: PageAllocator

    def sequence(self, token_ids: Iterable[int], num_pages: int | None = None, **sampling: Any) -> Sequence:
        tokens = list(token_ids)
        sampling = {"temperature": 0.0, "max_tokens": 64, **sampling}
        need = -(-(len(tokens) + sampling["max_tokens"]) // self.engine.page_size)
        pages = self.allocator.allocate(num_pages or need)
        return Sequence(f"r{pages[0]}", tokens, len(tokens), SamplingParams(**sampling), pages=pages)

    def step(self, chunks: list[StepChunk], **hooks: Callable[[int], None]) -> torch.Tensor:
        """Runs the chunks and appends the sampled tokens; the logits."""
        logits = self.engine.forward(chunks, **hooks)
        last = [chunk.sequence for chunk in chunks if chunk.is_last]
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.start + chunk.num_tokens
        if last:
            for sequence, token in zip(last, self.engine.sample(logits, last), strict=True):
                sequence.token_ids.append(token.token_id)
        return logits

    def run(self, sequences: list[Sequence], chunk_len: int, until: int) -> dict[str, list[torch.Tensor]]:
        """Steps until every sequence has `until` output tokens, chunks of prompts beside single decode tokens."""
        logits: dict[str, list[torch.Tensor]] = {sequence.request_id: [] for sequence in sequences}
        while pending := [one for one in sequences if one.num_output_tokens < until]:
            chunks = [next_chunk(sequence, chunk_len) for sequence in pending]
            last = [chunk.sequence.request_id for chunk in chunks if chunk.is_last]
            for name, row in zip(last, self.step(chunks), strict=True):
                logits[name].append(row)
        return logits


def next_chunk(sequence: Sequence, chunk_len: int) -> StepChunk:
    start = sequence.num_computed_tokens
    return StepChunk(sequence, start, min(chunk_len, sequence.num_tokens - start))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    made: dict[tuple[str, str], Checkpoint] = {}

    def make(name: str, max_shard_size: str = "1GB") -> Checkpoint:
        if (name, max_shard_size) not in made:
            config_type, changes = VARIANTS[name]
            torch.manual_seed(sorted(VARIANTS).index(name))
            config = config_type(**{**COMMON, **changes})
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
            folder = tmp_path_factory.mktemp(name)
            with torch.no_grad():  # biases and norms begin as zeros and ones, which would hide that they are not read
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            made[name, max_shard_size] = Checkpoint(folder, model)
        return made[name, max_shard_size]

    return make


@pytest.fixture(scope="session")
def lab() -> Callable[..., Lab]:
    def make(folder: Path, block_size: int = 8, num_tokens: int = 2048, **options: Any) -> Lab:
        loaded = Engine.load(
            ModelOptions(path=str(folder), device="cpu", block_size=block_size, **options), kv_capacity_tokens=num_tokens, num_threads=1
        )
        allocator = PageAllocator(loaded.cache.num_pages)
        allocator.allocate(3)  # so that a sequence's pages are not simply 0, 1, 2
        return Lab(loaded, allocator)

    return make


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[int]]:
    """prompt(length, seed): token ids."""

    def make(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * seed + length)
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    return make
