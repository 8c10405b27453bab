from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.timing.chunk_sizer import AHEAD, LEAST_CHUNK_TOKENS, MARGIN, ChunkSizer, token_target_s
from halfmoon.protocol.timing.step_cost import ChunkWork, StepCost, StepWork

COST = StepCost(read_s=5e-3, chunk_s=1e-3, per_token_s=20e-6, per_attention_s=1e-9, per_decode_s=1e-5, per_context_s=4e-8)
ROWS = (16, 32, 64, 128, *range(192, 1024, 64), 1088, 2112)


def sizer(row_counts: tuple[int, ...] = (), most: int = 4096, beside: int = 2048) -> ChunkSizer:
    return ChunkSizer(most=most, most_beside=beside, least=LEAST_CHUNK_TOKENS, row_counts=row_counts)


def seconds(cost: StepCost, decodes: StepWork, waiting: list[ChunkWork], num_tokens: int) -> float:
    """Said once more, from the formula alone: one prompt after another, a token at a time."""
    pairs, left, computed = 0.0, num_tokens, 0
    for prefix, num_left in waiting:
        for at in range(min(num_left, left)):
            pairs += prefix + at + 0.5
            computed += 1
        left -= min(num_left, left)
    products_s = cost.chunk_s + computed * cost.per_token_s if computed else 0.0
    rest_s = pairs * cost.per_attention_s + decodes.num_decodes * cost.per_decode_s + decodes.num_context_tokens * cost.per_context_s
    return max(cost.read_s, products_s) + rest_s


prompts = st.lists(st.builds(ChunkWork, st.integers(0, 60_000), st.integers(1, 4000)), min_size=1, max_size=4)
batches = st.builds(lambda num, each: StepWork(num_decodes=num, num_context_tokens=num * each), st.integers(1, 100), st.integers(1, 60_000))


@given(batches, prompts, st.floats(1e-3, 0.2), st.sampled_from([(), ROWS]))
def test_a_step_is_never_predicted_over_its_target_unless_it_has_the_least(
    decodes: StepWork, waiting: list[ChunkWork], target_s: float, rows: tuple[int, ...]
) -> None:
    found = sizer(rows).num_tokens(COST, decodes, target_s, waiting)
    assert found == sizer(rows).num_tokens(COST, decodes, target_s, waiting), "the same every time"
    assert LEAST_CHUNK_TOKENS <= found <= 2048, "a prompt never starves"
    if found > LEAST_CHUNK_TOKENS:
        assert seconds(COST, decodes, waiting, found) <= target_s * (1 + 1e-9)


@given(batches, prompts, st.floats(1e-3, 0.2))
def test_the_next_larger_size_would_not_have_fitted(decodes: StepWork, waiting: list[ChunkWork], target_s: float) -> None:
    found = sizer().num_tokens(COST, decodes, target_s, waiting)
    if found < 2048:
        larger = min((found // 64 + 1) * 64, 2048)
        assert seconds(COST, decodes, waiting, larger) > target_s * (1 - 1e-9)


@given(batches, prompts, st.floats(1e-3, 0.2), st.floats(1.0, 4.0))
def test_more_time_never_makes_a_chunk_smaller(decodes: StepWork, waiting: list[ChunkWork], target_s: float, factor: float) -> None:
    assert sizer(ROWS).num_tokens(COST, decodes, target_s, waiting) <= sizer(ROWS).num_tokens(COST, decodes, target_s * factor, waiting)


def test_without_decode_tokens_it_is_what_prefill_likes_best_and_without_a_target_what_is_allowed_beside_them() -> None:
    waiting = [ChunkWork(0, 9000)]
    assert sizer().num_tokens(COST, StepWork(), 0.01, waiting) == 4096
    assert sizer().num_tokens(COST, StepWork(num_decodes=3), math.inf, waiting) == 2048
    assert sizer().num_tokens(COST, StepWork(num_decodes=3), math.inf, []) == 0, "nothing waits"


@given(batches, st.floats(1e-3, 0.2))
def test_with_graphs_a_step_fills_the_rows_of_one(decodes: StepWork, target_s: float) -> None:
    found = sizer(ROWS).num_tokens(COST, decodes, target_s, [ChunkWork(0, 100_000)])
    assert found in (LEAST_CHUNK_TOKENS, 2048) or found + decodes.num_decodes in ROWS


def test_who_was_faster_than_its_pace_lends_a_part_of_it_and_never_more_than_it_has() -> None:
    assert token_target_s(0.05, 0, 0.0) == pytest.approx(MARGIN * 0.05)
    assert token_target_s(0.05, 4, 4 * 0.02) == pytest.approx(0.048 + (4 * 0.048 - 0.08) / 4)
    assert token_target_s(0.05, 1000, 10.0) == pytest.approx(0.048 + AHEAD * 0.05), "a single gap has a bound, too"
    assert token_target_s(0.05, 4, 10.0) == pytest.approx(0.048), "a late one does not make prompts late"
    assert token_target_s(math.inf, 4, 10.0) == math.inf


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60))
def test_whoever_takes_what_the_target_allows_keeps_its_mean(shares: list[float]) -> None:
    elapsed_s = 0.0
    for number, share in enumerate(shares):
        elapsed_s += share * token_target_s(0.05, number, elapsed_s)
        assert elapsed_s <= (number + 1) * 0.05 * MARGIN * (1 + 1e-9)
