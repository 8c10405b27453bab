from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from halfmoon.engine.sampler import sample
from halfmoon.engine.sequence import Sequence
from halfmoon.kernels.reference.philox import uniform
from halfmoon.protocol.sampling import SamplingParams

VOCAB_SIZE = 12
EOS = frozenset({3})


def sequence(prompt=(1, 2), output=(), **sampling) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 100, **sampling})
    return Sequence("r", [*prompt, *output], len(prompt), params)


def logits(seed: int, rows: int = 1, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * spread


def token(row: torch.Tensor, one: Sequence) -> int:
    return sample(row.view(1, -1), [one], EOS)[0].token_id


def penalised(row: list[float], one: Sequence) -> list[float]:
    """By the definitions, token by token."""
    params, output = one.sampling, one.token_ids[one.num_prompt_tokens :]
    out = []
    for token_id, value in enumerate(row):
        if token_id in one.token_ids:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token_id) + params.presence_penalty * (token_id in output)
        out.append(value + params.logit_bias.get(token_id, 0.0))
    return out


def test_greedy_takes_the_likeliest_of_each_row():
    rows = logits(0, 5)
    assert [found.token_id for found in sample(rows, [sequence()] * 5, EOS)] == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.4},
        {"presence_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 0.9},
        {"logit_bias": {4: 6.0, 7: -100.0}},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {5: 2.0}},
    ],
)
def test_penalties_and_bias_equal_their_definitions(params):
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        prompt, output = torch.randint(0, VOCAB_SIZE, (2, 6), generator=generator).tolist()
        one, row = sequence(prompt, output, **params), logits(seed)
        values = penalised(row[0].tolist(), one)
        assert token(row, one) == values.index(max(values))


def test_presence_and_frequency_penalties_leave_the_prompt_alone():
    row = torch.zeros(VOCAB_SIZE)
    row[1], row[2] = 1.0, 0.5
    assert token(row, sequence(prompt=(1, 1, 1), presence_penalty=2.0, frequency_penalty=2.0)) == 1
    assert token(row, sequence(prompt=(0,), output=(1,), presence_penalty=2.0)) == 2
    assert token(row, sequence(prompt=(1,), repetition_penalty=5.0)) == 2


def test_penalties_of_one_row_leave_the_others_and_the_logits_alone():
    rows = logits(3, 3)
    before = rows.clone()
    best = rows.argmax(-1).tolist()
    mixed = [sequence(), sequence(output=(best[1],), frequency_penalty=2.0, logit_bias={best[1]: -100.0}), sequence()]
    found = [one.token_id for one in sample(rows, mixed, EOS)]
    assert [found[0], found[2]] == [best[0], best[2]] and found[1] != best[1]
    assert torch.equal(rows, before)


def test_nothing_that_ends_the_sequence_is_drawn_before_min_tokens():
    row = torch.zeros(VOCAB_SIZE)
    row[3], row[5], row[6] = 9.0, 8.0, 7.0
    params = {"min_tokens": 2, "stop_token_ids": (5, 400)}
    assert token(row, sequence(**params)) == 6
    assert token(row, sequence(output=(6,), **params)) == 6
    assert token(row, sequence(output=(6, 6), **params)) == 3
    # an end-of-sequence token that ends nothing need not be kept out
    assert token(row, sequence(**params, ignore_eos=True)) == 3
    assert token(row, sequence(**params, logit_bias={3: 100.0})) == 6


def test_bias_for_a_token_beyond_the_vocabulary_is_passed_over():
    row = logits(4)
    assert token(row, sequence(logit_bias={10**6: 100.0})) == int(row.argmax())


def test_logprobs_are_those_of_the_raw_logits():
    rows = logits(6, 4)
    asked = [
        sequence(num_logprobs=3, temperature=0.3, top_k=1, seed=1),
        sequence(),
        sequence(num_logprobs=0, logit_bias={2: 100.0}),
        sequence(num_logprobs=20, repetition_penalty=2.0),
    ]
    found = sample(rows, asked, EOS)
    for row, one in zip(rows.tolist(), found, strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        wanted = {index: value - total for index, value in enumerate(row)}
        if one.logprob is not None:
            assert one.logprob == pytest.approx(wanted[one.token_id], abs=1e-5)
            assert [index for index, _ in one.top] == sorted(wanted, key=lambda index: -wanted[index])[: len(one.top)]
            assert all(value == pytest.approx(wanted[index], abs=1e-5) for index, value in one.top)
    assert [len(one.top) for one in found] == [3, 0, 0, VOCAB_SIZE]
    assert found[1].logprob is None and found[2].token_id == 2 and found[2].logprob is not None


def test_a_replay_with_the_tokens_so_far_draws_the_same_ones():
    """The output index counts from the user's prompt, wherever the tokens before it were drawn."""
    params = {"temperature": 1.2, "top_p": 0.95, "frequency_penalty": 0.2, "seed": 2**64 - 3}
    rows = logits(8, 12, spread=1.0)
    first = sequence(**params)
    for row in rows:
        first.token_ids.append(token(row, first))
    assert len(set(first.token_ids[2:])) > 3
    replayed = sequence(output=first.token_ids[2:7], **params)
    for row in rows[5:]:
        replayed.token_ids.append(token(row, replayed))
    assert replayed.token_ids == first.token_ids


def test_a_rows_token_is_the_same_in_any_batch():
    rows = logits(9, 30, spread=1.0)
    many = [sequence(output=[1] * (i % 4), temperature=(0.0, 1.0, 2.0)[i % 3], top_k=(0, 4)[i % 2], min_p=0.01, seed=i) for i in range(30)]
    together = [one.token_id for one in sample(rows, many, EOS)]
    assert together == [token(rows[index], many[index]) for index in range(30)]
    order = list(reversed(range(30)))
    assert [one.token_id for one in sample(rows[order], [many[i] for i in order], EOS)] == together[::-1]


def test_seeds_and_output_indices_give_other_draws():
    flat = torch.zeros(1, 5000)
    seeds = {token(flat, sequence(temperature=1.0, seed=seed)) for seed in range(50)}
    indices = {token(flat, sequence(output=[1] * count, temperature=1.0, seed=7)) for count in range(50)}
    assert len(seeds) > 45 and len(indices) > 45


def test_the_draw_is_counted_from_the_prompts_end_whatever_the_prompts_length():
    flat = torch.zeros(1, 5000)
    for count in range(5):
        drawn = {token(flat, sequence(prompt=[1] * length, output=[1] * count, temperature=1.0, seed=7)) for length in (1, 4, 9)}
        u = uniform(np.array([7], dtype=np.uint64), np.array([count], dtype=np.uint64))[0]
        assert drawn == {int(u * 5000)}
