"""Any parameters of a request with any logits, through every sampler: a token that may be drawn, or the reason why there is none."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy as np
import pytest
import torch

from halfmoon.engine.draw_columns import DRAW_COLUMNS, DrawColumns
from halfmoon.engine.executor import NOT_FINITE, NOTHING_LEFT
from halfmoon.engine.sampler import sample
from halfmoon.engine.sequence import Sequence
from halfmoon.kernels.sampling import NO_TOKEN, likeliest, sampling
from halfmoon.protocol.errors import InvalidRequest
from halfmoon.protocol.sampling import SamplingParams

VOCAB_SIZE = 24
EOS = frozenset({3})
HUGE = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).smallest_subnormal)
ODD = (math.nan, math.inf, -math.inf, HUGE, -HUGE, TINY, -TINY, 0.0, -0.0, 1.0)

NUMBERS = (
    0.0,
    1e-300,
    1e-46,
    1e-45,
    1e-40,
    1e-38,
    2e-38,
    1e-30,
    1e-7,
    0.009,
    0.01,
    0.5,
    0.9,
    1.0,
    1.5,
    2.0,
    99.9,
    100.0,
    1e38,
    1e39,
    1e300,
)


def some_params(chance: random.Random) -> SamplingParams:
    """Drawn until the proxy would take them."""
    while True:
        fields: dict[str, Any] = {"seed": chance.getrandbits(64), "max_tokens": 8, "min_tokens": chance.choice((0, 0, 0, 8))}
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if chance.random() < 0.4:
                fields[name] = chance.choice(NUMBERS)
        for name in ("presence_penalty", "frequency_penalty"):
            if chance.random() < 0.2:
                fields[name] = chance.choice((-1, 1)) * chance.choice(NUMBERS)
        if chance.random() < 0.3:
            fields["top_k"] = chance.choice((1, 2, VOCAB_SIZE, 2**31 - 1))
        if chance.random() < 0.2:
            fields["logit_bias"] = {chance.randrange(2 * VOCAB_SIZE): chance.choice((-100.0, 100.0, 1e-300, 3.3)) for _ in range(3)}
        if chance.random() < 0.2:
            fields["stop_token_ids"] = tuple(chance.sample(range(VOCAB_SIZE), chance.choice((1, VOCAB_SIZE - 1, VOCAB_SIZE))))
        fields["ignore_eos"] = chance.random() < 0.5
        if chance.random() < 0.2:
            fields["num_logprobs"] = chance.randrange(21)
        try:
            return SamplingParams(**fields)
        except InvalidRequest:
            continue


def some_logits(chance: random.Random) -> list[float]:
    kind = chance.randrange(8)
    if kind == 0:
        return [chance.choice(ODD)] * VOCAB_SIZE
    if kind == 1:
        return [chance.choice(ODD) for _ in range(VOCAB_SIZE)]
    if kind == 2:
        return [chance.choice((HUGE, -HUGE, 1.0, -1.0)) for _ in range(VOCAB_SIZE)]
    row = [chance.gauss(0.0, 10.0 ** chance.randrange(-3, 4)) for _ in range(VOCAB_SIZE)]
    if kind == 3:
        row[chance.randrange(VOCAB_SIZE)] = chance.choice(ODD)
    if kind == 4:
        row = [-math.inf] * VOCAB_SIZE
        row[chance.randrange(VOCAB_SIZE)] = chance.choice((0.0, HUGE, -HUGE, TINY))
    return row


def some_sequence(chance: random.Random, params: SamplingParams) -> Sequence:
    prompt = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(1, 5))]
    return Sequence("r", [*prompt, *(chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(4)))], len(prompt), params)


def allowed(row: list[float], sequence: Sequence) -> set[int] | int:
    """What may come of a row, by the definitions: tokens, or why there is none."""
    if any(math.isnan(value) or value == math.inf for value in row) or all(value == -math.inf for value in row):
        return NOT_FINITE
    params, banned = sequence.sampling, set[int]()
    if sequence.num_output_tokens < params.min_tokens:
        banned = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    left = {token for token, value in enumerate(row) if value > -math.inf} - banned
    return left or NOTHING_LEFT


def check_cases(num_cases: int, seed: int, batch_size: int = 250) -> None:
    chance = random.Random(seed)
    for _ in range(-(-num_cases // batch_size)):
        sequences = [some_sequence(chance, some_params(chance)) for _ in range(batch_size)]
        rows = [some_logits(chance) for _ in sequences]
        logits = torch.tensor(rows, dtype=torch.float32)
        rows = logits.tolist()
        _check(sequences, rows, [(found.token_id, found.logprob) for found in sample(logits, sequences, EOS)])
        _check_plain(rows, likeliest(logits).tolist())
        _check_plain(rows, _drawn_in_columns(sequences, logits))


def _check(sequences: list[Sequence], rows: list[list[float]], found: list[tuple[int, float | None]]) -> None:
    for sequence, row, (token_id, logprob) in zip(sequences, rows, found, strict=True):
        wanted = allowed(row, sequence)
        assert token_id == wanted if isinstance(wanted, int) else token_id in wanted, (sequence.sampling, row)
        if sequence.sampling.num_logprobs is not None and token_id >= 0:
            assert logprob is not None and not math.isnan(logprob) and logprob <= 0.0


def _check_plain(rows: list[list[float]], token_ids: list[int]) -> None:
    plain = Sequence("r", [0], 1, SamplingParams())
    for row, token_id in zip(rows, token_ids, strict=True):
        wanted = allowed(row, plain)
        assert token_id == NO_TOKEN if isinstance(wanted, int) else token_id in wanted, row


def _drawn_in_columns(sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
    """As steps that are launched draw."""
    columns = {name: np.zeros(len(sequences), dtype=dtype) for name, dtype in DRAW_COLUMNS.items()}
    DrawColumns(columns).fill(sequences, np.array([sequence.num_tokens for sequence in sequences]), len(sequences))
    return sampling(logits, *(torch.from_numpy(columns[name]) for name in DRAW_COLUMNS)).tolist()


def test_any_parameters_and_any_logits_give_a_token_that_may_be_drawn_or_say_why_there_is_none() -> None:
    check_cases(750, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_of_many_more_cases() -> None:
    """HALFMOON_SAMPLING_CASES: how many, for a long run."""
    check_cases(int(os.environ.get("HALFMOON_SAMPLING_CASES", "10000")), seed=2)
