from __future__ import annotations

import time

import pytest

from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.v1 import common_pb2

EOS = frozenset({9})
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


def sequence(output=(), **sampling) -> Sequence:
    return Sequence("r", [9, 9, *output], 2, SamplingParams(**{"max_tokens": 4, **sampling}))


@pytest.mark.parametrize(
    ("output", "sampling", "reason"),
    [
        ((), {}, None),
        ((1,), {}, None),
        ((1, 9), {}, STOP),
        ((1, 9), {"ignore_eos": True}, None),
        ((1, 5), {"stop_token_ids": (5,)}, STOP),
        ((1, 5), {"stop_token_ids": (5,), "ignore_eos": True}, STOP),
        ((1, 9), {"min_tokens": 3}, None),
        ((1, 1, 9), {"min_tokens": 3}, STOP),
        ((1, 1, 1, 1), {}, LENGTH),
        ((1, 1, 1, 9), {}, STOP),
    ],
)
def test_the_last_output_token_ends_the_sequence_or_not(output, sampling, reason):
    assert sequence(output, **sampling).finish_reason(EOS) == reason


def test_a_chunk_is_last_when_it_reaches_the_last_token():
    one = sequence((1, 2))
    assert StepChunk(one, 0, 4).is_last and StepChunk(one, 3, 1).is_last and not StepChunk(one, 0, 3).is_last


def test_a_spec_brings_the_users_prompt_length_and_what_is_left_of_its_time():
    spec = common_pb2.SequenceSpec(
        request_id="r", token_ids=[1, 2, 3], num_prompt_tokens=2, sampling=SamplingParams(seed=5).to_proto(), deadline_s=3.0, queue_order=-1
    )
    before = time.monotonic()
    one = Sequence.from_proto(spec)
    after = time.monotonic()
    assert (one.token_ids, one.num_output_tokens, one.sampling.seed, one.queue_order) == ([1, 2, 3], 1, 5, -1)
    assert before + 3.0 <= one.deadline <= after + 3.0 and one.remaining_s <= 3.0
