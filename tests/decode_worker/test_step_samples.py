"""What a load report tells of recent steps."""

from __future__ import annotations

import itertools

from halfmoon.decode_worker.step_samples import INTERVAL_S, NUM_KEPT, StepSamples
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.sampling import SamplingParams


def chunk(start: int, num_tokens: int) -> StepChunk:
    return StepChunk(Sequence("r", [1] * (start + num_tokens), 1, SamplingParams(max_tokens=1)), start, num_tokens)


def test_a_sample_counts_decoded_sequences_their_context_and_the_prompt_tokens_beside_them() -> None:
    samples = StepSamples()
    samples.note([chunk(9, 1), chunk(0, 64), chunk(99, 1)], 5.0, 5.25)
    (found,) = samples.take()
    assert (found.num_sequences, found.num_kv_tokens, found.num_prefill_tokens, found.seconds) == (2, 110, 64, 0.25)
    assert samples.take() == [], "each is told once"


def test_samples_are_some_of_the_steps_and_the_latest_of_them() -> None:
    samples = StepSamples()
    for number in range(1000):
        samples.note([chunk(number, 1)], number * INTERVAL_S / 4, (number + 1) * INTERVAL_S / 4)
    found = samples.take()
    assert len(found) == NUM_KEPT and found[-1].num_kv_tokens > 990
    gaps = [later.num_kv_tokens - earlier.num_kv_tokens for earlier, later in itertools.pairwise(found)]
    assert set(gaps) <= {4, 5}, "one every INTERVAL_S"
    samples.note([], 1e9, 1e9)
    assert samples.take() == [], "a step without chunks is none"
