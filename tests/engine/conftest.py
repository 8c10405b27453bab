"""Tiny checkpoints that transformers itself writes, engines on them, and a loop that runs them as a worker would."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from halfmoon.engine.engine import Engine
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.sampling import SamplingParams

VOCAB_SIZE = 256


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
