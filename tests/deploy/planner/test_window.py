"""What of a trace is simulated, and what is told of the rest."""

from __future__ import annotations

import pytest

from halfmoon.deploy.planner.synthetic import synthetic_trace
from halfmoon.deploy.planner.window import FEWEST, MOST, choose_window, enough
from halfmoon.protocol.errors import ConfigError
from halfmoon.proxy.conductor.placement import Slo
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.replay import replay
from halfmoon.simulator.trace import Trace, TraceRequest

SLO = Slo(2.0, 0.05)


def steady(num: int, gap_s: float, first_s: float = 0.0, num_input: int = 100, fresh: int = 0) -> list[TraceRequest]:
    return [TraceRequest(first_s + gap_s * at, num_input, 10, (fresh + at,)) for at in range(num)]


def trace_of(*parts: list[TraceRequest]) -> Trace:
    return Trace("made", "", tuple(request for part in parts for request in part))


def test_the_busiest_requests_in_a_row_are_taken_and_those_before_warm_the_caches(small_cost: CostModel) -> None:
    calm, busy, late = steady(400, 1.0), steady(400, 0.1, 400.0, fresh=1000), steady(400, 1.0, 440.0, fresh=2000)
    window = choose_window(trace_of(calm, busy, late), small_cost, SLO, longest=1000, num_instances=1, num_requests=400)
    found = replay(window.trace, window.options)
    assert [one.block_ids for one in found.requests] == [one.block_ids for one in busy]
    assert len(found.warm) == 300 and window.num_requests == 400
    assert window.rate == pytest.approx(10.0) and window.needed_rate == window.rate
    assert any("simulated are the busiest 400 requests in a row, 10 a second; all 1200 have" in note for note in window.notes)


def test_busy_is_a_matter_of_work_and_not_of_requests(small_cost: CostModel) -> None:
    many, long = steady(400, 0.1), steady(400, 0.2, 40.0, num_input=900, fresh=1000)
    window = choose_window(trace_of(many, long), small_cost, SLO, longest=1000, num_instances=1, num_requests=400)
    assert {one.num_input_tokens for one in replay(window.trace, window.options).requests} == {900}


def test_the_trace_is_scaled_to_the_rate_that_was_asked_for(small_cost: CostModel) -> None:
    window = choose_window(trace_of(steady(400, 0.5)), small_cost, SLO, longest=1000, num_instances=1, rate=6.0)
    assert window.speed == pytest.approx(3.0, rel=0.01) and window.needed_rate == pytest.approx(6.0)


def test_requests_that_are_too_long_are_left_out_and_counted(small_cost: CostModel) -> None:
    window = choose_window(
        trace_of(steady(400, 1.0), steady(7, 1.0, 400.0, 2000)), small_cost, SLO, longest=1000, num_instances=1, num_requests=400
    )
    assert window.num_requests == 400 and "7 of 407 requests are left out: they have more than 1000 tokens" in window.notes
    with pytest.raises(ConfigError, match="has 0 requests of at most 50 tokens"):
        choose_window(trace_of(steady(400, 1.0)), small_cost, SLO, longest=50, num_instances=1)


def test_a_clock_that_ticks_is_told_and_its_arrivals_are_spread(small_cost: CostModel) -> None:
    ticking = [one._replace(arrival_s=one.arrival_s // 3 * 3) for one in steady(400, 0.5)]
    window = choose_window(trace_of(ticking), small_cost, SLO, longest=1000, num_instances=1, num_requests=400)
    assert "arrivals are spread inside the clock's ticks of 3 s" in window.notes
    assert len({one.arrival_s for one in window.trace.requests}) == 400


def test_few_requests_are_called_few(small_cost: CostModel) -> None:
    window = choose_window(trace_of(steady(25, 1.0)), small_cost, SLO, longest=1000, num_instances=1)
    assert window.num_requests == 25 and any(
        "25 requests are few: a share of them in SLO is uncertain by 20 points" in one for one in window.notes
    )


def test_what_is_shared_is_no_work(small_cost: CostModel) -> None:
    apart = [TraceRequest(float(at), 1024, 1, (2 * at, 2 * at + 1)) for at in range(400)]
    shared = [one._replace(block_ids=(0, 1)) for one in apart]
    found = [choose_window(trace_of(one), small_cost, SLO, longest=2000, num_instances=1) for one in (apart, shared)]
    assert found[0].work == pytest.approx(1.024, rel=0.02) and found[1].work < 0.02


def test_longer_answers_and_more_instances_want_more_requests_within_bounds(small_cost: CostModel) -> None:
    slow = Slo(2.0, 1.0)
    short, long = (trace_of([one._replace(num_output_tokens=num) for one in steady(10, 1.0)]).requests for num in (2, 30))
    assert enough(list(short), small_cost, slow, 1) == FEWEST < enough(list(long), small_cost, slow, 1)
    assert enough(list(long), small_cost, slow, 1) < enough(list(long), small_cost, slow, 2) <= MOST


def test_a_synthetic_load_has_the_rate_and_the_lengths_that_it_was_told() -> None:
    found = synthetic_trace(5.0, "uniform:100:300", "50", "gamma", 0.25, seed=1)
    assert len(found.requests) / found.duration_s == pytest.approx(5.0, rel=0.1)
    assert {one.num_output_tokens for one in found.requests} == {50}
    assert min(one.num_input_tokens for one in found.requests) >= 100 and max(one.num_input_tokens for one in found.requests) <= 300
    with pytest.raises(ConfigError, match="give --rate"):
        synthetic_trace(0.0, "100", "50", "poisson", 1.0, seed=1)
