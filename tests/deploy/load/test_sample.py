"""The measures of one request, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from halfmoon.deploy.load.sample import Sample


def sample(arrivals_s: list[float], completion_tokens: int | None = None, **values: object) -> Sample:
    made = Sample(0, "r", 0, 0.0, 0.0, 8, 4, outcome="ok", arrivals_s=arrivals_s, completion_tokens=completion_tokens)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_one_token_a_chunk() -> None:
    found = sample([1.0, 1.1, 1.4, 1.5], 4)
    assert found.ttft_s == 1.0
    assert found.gaps_s == pytest.approx([0.1, 0.3, 0.1])
    assert found.tpot_s == pytest.approx(0.5 / 3)
    assert found.tail_itl_s == pytest.approx(0.3)


def test_tokens_that_share_a_chunk_came_together_and_their_gaps_are_zero() -> None:
    # chunks of 1, 3 and 2 tokens
    found = sample([1.0, 1.4, 1.6], 6)
    assert sorted(found.gaps_s) == pytest.approx([0.0, 0.0, 0.0, 0.2, 0.4])
    assert found.tpot_s == pytest.approx(0.6 / 5) == pytest.approx(sum(found.gaps_s) / len(found.gaps_s))


def test_without_the_servers_count_a_chunk_is_a_token() -> None:
    found = sample([1.0, 1.4, 1.6])
    assert (found.num_tokens, found.tpot_s) == (3, pytest.approx(0.3))


def test_the_tail_is_the_mean_of_the_longest_tenth_of_gaps() -> None:
    arrivals = [0.0]
    for gap in [0.01] * 27 + [0.5, 0.3, 0.1]:
        arrivals.append(arrivals[-1] + gap)
    assert sample(arrivals, 31).tail_itl_s == pytest.approx((0.5 + 0.3 + 0.1) / 3)


def test_the_tail_counts_tokens_that_came_together_among_the_gaps() -> None:
    # 40 tokens in 2 chunks: 39 gaps, so the longest 3 are one of 1 s and two of zero
    assert sample([0.0, 1.0], 40).tail_itl_s == pytest.approx(1 / 3)


def test_an_answer_of_one_token_has_a_ttft_and_no_pace() -> None:
    found = sample([0.7], 1)
    assert (found.ttft_s, found.tpot_s, found.tail_itl_s, found.gaps_s) == (0.7, None, None, [])


def test_a_sample_comes_back_from_its_plain_values() -> None:
    before = sample([1.0, 1.25], 2, error="", phases={"prefill_s": 0.5})
    assert Sample.from_dict(before.as_dict()) == dataclasses.replace(before)
