"""Synthetic load and traces as plans, and the tokens made of them."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfmoon.deploy.load.plan import Plan, PlannedRequest, Segment, materialise, measured_within, with_cancellations
from halfmoon.deploy.load.synthetic_plan import SyntheticOptions, synthetic_plan
from halfmoon.deploy.load.trace_plan import TraceOptions, trace_plan
from halfmoon.protocol.errors import ConfigError
from halfmoon.simulator.trace import Trace, read_trace

ROWS = [
    {"timestamp": 0, "input_length": 700, "output_length": 30, "hash_ids": [0, 1]},
    {"timestamp": 0, "input_length": 1100, "output_length": 900, "hash_ids": [0, 2, 3]},
    {"timestamp": 3000, "input_length": 1536, "output_length": 5, "hash_ids": [0, 2, 4]},
    {"timestamp": 3000, "input_length": 5000, "output_length": 5, "hash_ids": list(range(10, 20))},
    {"timestamp": 9000, "input_length": 512, "output_length": 5, "hash_ids": [0]},
    {"timestamp": 9000, "input_length": 513, "output_length": 5, "hash_ids": [0, 5]},
]


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, ROWS)).encode()))
    return read_trace(path)


def tokens(plan: Plan, factor: float = 1.0, salt: int = 0) -> list[Any]:
    return materialise(plan.requests, factor, salt, 2000)


def common(one: Any, other: Any) -> int:
    size = min(len(one), len(other))
    differing = np.flatnonzero(one[:size] != other[:size])
    return int(differing[0]) if len(differing) else size


def test_a_traces_prompts_are_as_long_as_told_and_share_what_their_hash_ids_share(trace: Trace) -> None:
    found = tokens(trace_plan(trace, TraceOptions(spread_s=0.0)))
    ids = [request.token_ids for request in found]
    assert [len(one) for one in ids] == [700, 1100, 1536, 5000, 512, 513]
    assert (common(ids[0], ids[1]), common(ids[1], ids[2]), common(ids[0], ids[4])) == (512, 1024, 512)
    assert common(ids[0], ids[3]) < 5  # no block in common
    assert min(one.min() for one in ids) >= 100 and max(one.max() for one in ids) < 2000
    assert [request.due_s for request in found] == [0, 0, 3, 3, 9, 9]


def test_block_keys_are_equal_as_far_as_prompts_are(trace: Trace) -> None:
    found = tokens(trace_plan(trace, TraceOptions(spread_s=0.0)))
    keys = [request.block_keys for request in found]
    assert [len(one) for one in keys] == [700 // 64, 1100 // 64, 1536 // 64, 5000 // 64, 8, 8]
    assert sum(a == b for a, b in zip(keys[1], keys[2], strict=False)) == 1024 // 64


def test_another_salt_is_the_same_load_in_other_tokens(trace: Trace) -> None:
    plan = trace_plan(trace, TraceOptions(spread_s=0.0))
    first, again, other = (tokens(plan, salt=salt) for salt in (4, 4, 5))
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(first, again, strict=True))
    assert common(other[1].token_ids, other[2].token_ids) == 1024 and common(first[1].token_ids, other[1].token_ids) < 5


def test_stamps_of_a_clock_that_ticks_are_spread_inside_the_tick(trace: Trace) -> None:
    plan = trace_plan(trace, TraceOptions())
    assert plan.description["tick_s"] == pytest.approx(4.5)  # the median of 3 s and 6 s
    moved = sorted(request.arrival_s for request in plan.requests)
    assert len(set(moved)) == 6 and all(0 <= after - before < 4.5 for after, before in zip(moved[:2], (0, 0), strict=True))


def test_a_clock_that_does_not_tick_is_left_alone() -> None:
    from halfmoon.simulator.trace import TraceRequest

    stamps = tuple(TraceRequest(0.37 * number, 100, 5, (number,)) for number in range(9))
    plan = trace_plan(Trace("t", "", stamps), TraceOptions())
    assert [request.arrival_s for request in plan.requests] == pytest.approx([0.37 * number for number in range(9)])


def test_long_prompts_are_left_out_and_long_answers_cut(trace: Trace) -> None:
    plan = trace_plan(trace, TraceOptions(spread_s=0.0, max_input=1536, max_output=400))
    assert [request.num_input_tokens for request in plan.requests] == [700, 1100, 1536, 512, 513]
    assert [request.num_output_tokens for request in plan.requests] == [30, 400, 5, 5, 5] and plan.description["num_too_long"] == 1


def test_a_window_begins_at_a_request_or_a_time_and_ends_after_a_count_or_seconds(trace: Trace) -> None:
    def lens(**options: Any) -> list[int]:
        return [request.num_input_tokens for request in trace_plan(trace, TraceOptions(spread_s=0.0, **options)).requests]

    assert lens(start=1, count=2) == [1100, 1536]
    assert lens(start_s=3.0) == [1536, 5000, 512, 513]
    assert lens(start_s=3.0, start=1, count=2) == [5000, 512]
    assert lens(seconds=3.0) == [700, 1100] and lens(seconds=3.5) == [700, 1100, 1536, 5000]
    with pytest.raises(ConfigError, match="empty"):
        lens(start=6)


def test_speed_divides_the_time(trace: Trace) -> None:
    assert [one.due_s for one in tokens(trace_plan(trace, TraceOptions(spread_s=0.0)), factor=3.0)] == [0, 0, 1, 1, 3, 3]


def test_a_warm_up_is_what_came_before_the_window(trace: Trace) -> None:
    plan = trace_plan(trace, TraceOptions(spread_s=0.0, start=2, num_warm_up=2))
    assert [request.num_input_tokens for request in plan.warm_up] == [700, 1100]
    warm, window = materialise(plan.warm_up, 1.0, 0, 2000), tokens(plan)
    assert common(warm[1].token_ids, window[0].token_ids) == 1024


def test_at_the_traces_beginning_a_warm_up_has_tokens_of_its_own(trace: Trace) -> None:
    plan = trace_plan(trace, TraceOptions(spread_s=0.0, num_warm_up=2))
    warm, window = materialise(plan.warm_up, 1.0, 0, 2000), tokens(plan)
    assert [len(one.token_ids) for one in warm] == [700, 1100] and common(warm[0].token_ids, window[0].token_ids) < 5


def test_a_share_of_a_synthetic_prompt_is_its_groups(trace: Trace) -> None:
    plan = synthetic_plan(SyntheticOptions(num_requests=40, input_len="200", shared_share=0.75, num_groups=2, seed=3))
    found = [request.token_ids for request in tokens(plan)]
    shared = {common(found[0], other) for other in found[1:]}
    assert 150 in shared and len(shared - set(range(5))) == 1  # of one group 150 tokens, of the other none
    assert all(len(one) == 200 for one in found)


def test_a_turn_brings_the_turns_before_it_along() -> None:
    options = SyntheticOptions(num_requests=12, input_len="50", output_len="20", turns=3, turn_gap=0.5, seed=2)
    found = sorted(tokens(synthetic_plan(options)), key=lambda request: len(request.token_ids))
    lens = [len(request.token_ids) for request in found]
    assert set(lens) == {50, 120, 190}
    first, second = found[0], [request for request in found if len(request.token_ids) == 120]
    assert 50 in [common(first.token_ids, request.token_ids) for request in second]


def test_turns_come_at_the_same_mean_rate_as_single_requests() -> None:
    plan = synthetic_plan(SyntheticOptions(num_requests=3000, turns=3, turn_gap=5.0, seed=1))
    assert plan.requests[-1].arrival_s / 3000 == pytest.approx(1.0, rel=0.1)


def test_a_rate_only_moves_the_requests() -> None:
    plan = synthetic_plan(SyntheticOptions(num_requests=20, input_len="uniform:10:90", seed=6))
    slow, fast = tokens(plan, 1.0), tokens(plan, 4.0)
    assert [one.due_s for one in fast] == pytest.approx([one.due_s / 4 for one in slow])
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(slow, fast, strict=True))


def test_the_share_that_leaves_is_near_what_was_asked_for_and_leaves_at_half() -> None:
    plan = synthetic_plan(SyntheticOptions(num_requests=2000, output_len="40", seed=0))
    leaving = [request for request in with_cancellations(plan, 0.3, seed=9).requests if request.cancel_after is not None]
    assert len(leaving) / 2000 == pytest.approx(0.3, abs=5 * (0.21 / 2000) ** 0.5) and {one.cancel_after for one in leaving} == {20}
    assert with_cancellations(plan, 0.0, seed=9) == plan


def test_only_arrivals_inside_the_window_count() -> None:
    requests = tuple(PlannedRequest(5.0 + number, (Segment(number, 4),), 2) for number in range(10))
    found = measured_within(Plan("rate", requests, (), {}), 2.0, 1.0, 3.0)
    assert [request.measured for request in found.requests] == [False] * 2 + [True] * 4 + [False] * 4
