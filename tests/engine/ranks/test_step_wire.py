"""Steps told to another rank: it has the chunks that rank 0 has."""

from __future__ import annotations

import random

from halfmoon.engine.ranks.step_wire import KEPT_STEPS, Kind, StepReader, StepWriter
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.sampling import SamplingParams


def made(number: int, random_: random.Random) -> Sequence:
    params = SamplingParams(
        temperature=random_.choice([0.0, 0.7]),
        top_p=0.9,
        min_p=0.1,
        top_k=random_.randrange(9),
        seed=random_.randrange(2**64),
        num_logprobs=random_.choice([None, 2]),
        min_tokens=random_.choice([0, 8]),
    )
    tokens = [random_.randrange(1000) for _ in range(random_.randrange(1, 30))]
    scored = random_.choice([None, 0, 3])
    return Sequence(f"r{number}", tokens, len(tokens), params, pages=[number, number + 1], num_prompt_logprobs=scored)


def test_every_chunk_comes_as_it_was_whatever_became_of_its_sequence_meanwhile() -> None:
    drawn, writer, reader = random.Random(3), StepWriter(), StepReader()
    sequences = [made(number, drawn) for number in range(8)]
    for number in range(1, 4 * KEPT_STEPS):
        chunks = [StepChunk(one, drawn.randrange(one.num_tokens), 1) for one in sequences if drawn.random() < 0.2 or one is sequences[0]]
        step = reader.read(writer.write(Kind.RUN, chunks, has_pushes=number % 3 == 0))
        assert (step.kind, step.number, step.has_pushes) == (Kind.RUN, number, number % 3 == 0)
        assert len(step.chunks) == len(chunks)
        for ours, theirs in zip(chunks, step.chunks, strict=True):
            assert theirs[1:] == ours[1:]
            for name in ("token_ids", "pages", "num_prompt_tokens", "num_prompt_logprobs", "num_scored_tokens"):
                assert getattr(theirs.sequence, name) == getattr(ours.sequence, name)
            for name in ("temperature", "top_p", "min_p", "top_k", "seed"):
                assert getattr(theirs.sequence.sampling, name) == getattr(ours.sequence.sampling, name)
            assert theirs.scored == ours.scored and theirs.samples == ours.samples
        for one in sequences:
            grown = drawn.random()
            if grown < 0.5:
                one.token_ids.append(drawn.randrange(1000))
            if grown < 0.3:
                one.pages.append(drawn.randrange(100))
            if grown < 0.1:
                one.pages = [drawn.randrange(100)]  # preempted, and given others
        if drawn.random() < 0.05:
            sequences[drawn.randrange(1, 8)] = made(number, drawn)


def test_what_is_known_is_not_told_again_and_who_stays_away_is_forgotten() -> None:
    writer, reader = StepWriter(), StepReader()
    stays, leaves = (Sequence(name, list(range(500)), 500, SamplingParams(), pages=list(range(9))) for name in ("stays", "leaves"))
    first = writer.write(Kind.RUN, [StepChunk(stays, 0, 500), StepChunk(leaves, 0, 500)], False)
    reader.read(first)
    stays.token_ids.append(7)
    second = writer.write(Kind.RUN, [StepChunk(stays, 500, 1)], False)
    assert len(first) > 1000 and len(second) < 20
    reader.read(second)
    for _ in range(2 * KEPT_STEPS):
        reader.read(writer.write(Kind.LAUNCH, [StepChunk(stays, 500, 1)], False))
    assert len(reader._sequences) == 1
    again = reader.read(writer.write(Kind.RUN, [StepChunk(leaves, 0, 500)], False))
    assert again.chunks[0].sequence.token_ids == leaves.token_ids
