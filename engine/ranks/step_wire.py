"""Steps as messages to the other ranks, which keep copies of the sequences: what they know already is not told again.

rank 0: StepWriter ─► [kind, step, pushes?, forgotten …, chunks: sequence, start, tokens, what is new of it] ─► StepReader: other ranks

So every rank gives its engine the same chunks, and the engine's own code runs them: kernel by kernel, or as a graph.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from ...protocol.sampling import SamplingParams
from ..decode_graph import is_plain
from ..sequence import Sequence, StepChunk
from .link import of_float, to_float

KEPT_STEPS = 64  # a sequence that was in none of so many is forgotten, and told as a new one when it comes again
NO_LOGPROBS = -1


class Kind(enum.IntEnum):
    RUN = 0
    LAUNCH = 1
    FIND_NOT_FINITE = 2  # pages; the answer is those of them
    SCRUB = 3  # pages


class Step(NamedTuple):
    kind: Kind
    number: int  # from 1 on
    has_pushes: bool
    chunks: list[StepChunk]


@dataclass(slots=True)
class _Told:
    """What the other ranks know of a sequence."""

    name: int
    pages: list[int]  # the sequence's own list: a new one is told as a whole
    num_tokens: int = 0
    num_pages: int = 0
    last_step: int = 0


class StepWriter:
    """For the step loop's thread."""

    def __init__(self) -> None:
        self.number = 0  # of the step told last
        self._told: dict[Sequence, _Told] = {}
        self._num_names = 0

    def write(self, kind: Kind, chunks: Seq[StepChunk], has_pushes: bool) -> list[int]:
        """To be sent to every rank, before the next one is written."""
        self.number += 1
        forgotten = self._forget() if self.number % KEPT_STEPS == 0 else []
        message = [kind, self.number, has_pushes, len(forgotten), *forgotten, len(chunks)]
        for chunk in chunks:
            message += self._chunk(chunk)
        return message

    def _forget(self) -> list[int]:
        """Names."""
        old = [sequence for sequence, told in self._told.items() if told.last_step < self.number - KEPT_STEPS]
        return [self._told.pop(sequence).name for sequence in old]

    def _chunk(self, chunk: StepChunk) -> Iterator[int]:
        sequence = chunk.sequence
        told = self._told.get(sequence)
        is_new = told is None
        if told is None:
            self._num_names += 1
            told = self._told[sequence] = _Told(self._num_names, sequence.pages)
        if told.pages is not sequence.pages:
            told.pages, told.num_pages = sequence.pages, 0
        tokens, pages = sequence.token_ids[told.num_tokens :], sequence.pages[told.num_pages :]
        yield from (told.name, chunk.start, chunk.num_tokens, sequence.num_scored_tokens, is_plain(chunk), is_new)
        if is_new:
            yield from _unchanging(sequence)
        yield from (told.num_pages == 0, len(pages), *pages, len(tokens), *tokens)
        told.num_tokens += len(tokens)
        told.num_pages += len(pages)
        told.last_step = self.number


class StepReader:
    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}

    def read(self, message: Seq[int]) -> Step:
        numbers = iter(message)
        kind, number, has_pushes = Kind(next(numbers)), next(numbers), bool(next(numbers))
        for name in _run(numbers):
            del self._sequences[name]
        return Step(kind, number, has_pushes, [self._chunk(numbers) for _ in range(next(numbers))])

    def _chunk(self, numbers: Iterator[int]) -> StepChunk:
        name, start, num_tokens, num_scored_tokens, plain, is_new = (next(numbers) for _ in range(6))
        if is_new:
            self._sequences[name] = _sequence(name, numbers)
        sequence = self._sequences[name]
        if next(numbers):
            sequence.pages = []
        sequence.pages += _run(numbers)
        sequence.token_ids += _run(numbers)
        sequence.num_scored_tokens = num_scored_tokens
        if (sequence.sampling.num_logprobs is None) is not bool(plain):
            # whatever else is asked for is rank 0's matter; here it counts that a graph's own draw is not all of it
            sequence.sampling = dataclasses.replace(sequence.sampling, num_logprobs=None if plain else 0)
        return StepChunk(sequence, start, num_tokens)


def _unchanging(sequence: Sequence) -> Iterator[int]:
    params, num_logprobs = sequence.sampling, sequence.num_prompt_logprobs
    yield sequence.num_prompt_tokens
    yield NO_LOGPROBS if num_logprobs is None else num_logprobs
    yield from (of_float(value) for value in (params.temperature, params.top_p, params.min_p))
    yield from (params.top_k, params.seed >> 32, params.seed & 0xFFFFFFFF)


def _sequence(name: int, numbers: Iterator[int]) -> Sequence:
    num_prompt_tokens, num_logprobs = next(numbers), next(numbers)
    temperature, top_p, min_p = (to_float(next(numbers)) for _ in range(3))
    top_k, high, low = (next(numbers) for _ in range(3))
    params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k, seed=high << 32 | low)
    scored = None if num_logprobs == NO_LOGPROBS else num_logprobs
    return Sequence(f"sequence {name}", [], num_prompt_tokens, params, num_prompt_logprobs=scored)


def _run(numbers: Iterator[int]) -> list[int]:
    return [next(numbers) for _ in range(next(numbers))]
