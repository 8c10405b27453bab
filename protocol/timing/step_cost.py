"""What a step takes: one read of the weights or the products of its chunks, whichever is longer, and what its tokens look at.

seconds = max(read_s, chunk_s + chunk tokens · per_token_s) + attention · per_attention_s + decodes · per_decode_s + context · per_context_s

A step of decode tokens alone is the read of the weights and of the context. A short chunk rides along under that read; a long one takes
over, and the read is hidden under its products. Context is read beside either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class StepWork(NamedTuple):
    """What a step computes."""

    num_chunk_tokens: int = 0
    attention: float = 0.0
    """Pairs of a chunk's token and a token before it, over all chunks: n·(p + n / 2) for n tokens behind p."""
    num_decodes: int = 0
    num_context_tokens: int = 0
    """Of the decodes."""


class StepCost(NamedTuple):
    """Seconds."""

    read_s: float
    """Of any step, however little it holds."""
    chunk_s: float
    """Of the products of any chunks, however short; below 0 where a straight line through longer ones says so."""
    per_token_s: float
    per_attention_s: float
    per_decode_s: float
    per_context_s: float

    def seconds(self, work: StepWork) -> float:
        num_tokens, attention, num_decodes, num_context_tokens = work
        products_s = self.chunk_s + num_tokens * self.per_token_s if num_tokens else 0.0
        rest_s = attention * self.per_attention_s + num_decodes * self.per_decode_s + num_context_tokens * self.per_context_s
        return max(self.read_s, products_s) + rest_s

    def alone_s(self, num_tokens: int, num_prefix_tokens: int, most: int = 2048) -> float:
        """Seconds of a prompt by itself, in chunks of `most` tokens."""
        num_chunks = -(-num_tokens // most)
        attention = attention_of(num_tokens, num_prefix_tokens)
        return num_chunks * self.chunk_s + num_tokens * self.per_token_s + attention * self.per_attention_s

    def scaled(self, factor: float) -> StepCost:
        """The same machine, so many times slower in everything."""
        return StepCost(*(weight * factor for weight in self))


class ChunkWork(NamedTuple):
    """A prompt, or a part of one, that waits to be computed."""

    num_prefix_tokens: int
    num_left_tokens: int


def attention_of(num_tokens: int, num_prefix_tokens: int) -> float:
    return num_tokens * (num_prefix_tokens + num_tokens / 2)


def with_chunks(decodes: StepWork, waiting: Iterable[ChunkWork], num_tokens: int) -> StepWork:
    """decodes and the first num_tokens of what waits, one after another; fewer where there are fewer."""
    attention, left = 0.0, num_tokens
    for prefix, num_left in waiting:
        taken = min(num_left, left)
        attention += attention_of(taken, prefix)
        left -= taken
        if not left:
            break
    return StepWork(num_tokens - left, attention, decodes.num_decodes, decodes.num_context_tokens)
