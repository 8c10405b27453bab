"""What of a trace is simulated, and at what speed: the busiest requests in a row, spread inside the clock's tick."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from ...protocol.errors import ConfigError
from ...proxy.conductor.placement import Slo
from ...proxy.conductor.predictors.cost_model import CostModel
from ...simulator.grid import busy_s
from ...simulator.replay import ReplayOptions
from ...simulator.trace import Trace, TraceRequest, ideal_hits
from ..load.trace_plan import find_tick

FEWEST, MOST = 300, 700  # requests
LIFETIMES = 2.0  # of an answer at the pace of the SLO, that a window lasts where MOST allows it
WARM_S = 300.0  # of the trace before the window, whose blocks are cached when it opens


class Window(NamedTuple):
    trace: Trace  # without what is too long, arrivals spread
    options: ReplayOptions
    num_requests: int
    rate: float  # requests a second in the window, at speed 1
    speed: float  # at which the trace has the rate that the plan is for
    work: float  # instances that are busy at speed 1, by the cost model, with all that an endless cache gives
    notes: tuple[str, ...]

    @property
    def needed_rate(self) -> float:
        return self.rate * self.speed


def choose_window(
    trace: Trace, cost: CostModel, slo: Slo, *, longest: int, num_instances: int, rate: float = 0.0, num_requests: int = 0, seed: int = 0
) -> Window:
    """
    Args:
        longest: tokens of prompt and answer that an instance serves.
        rate: requests a second that the whole trace is scaled to; 0: its own.
        num_requests: of the window; 0: enough for the SLO's pace.

    Raises ConfigError where nothing is left.
    """
    kept = [one for one in trace.requests if one.num_input_tokens + one.num_output_tokens <= longest]
    notes: list[str] = []
    if len(kept) < len(trace.requests):
        notes.append(
            f"{len(trace.requests) - len(kept)} of {len(trace.requests)} requests are left out: they have more than {longest} tokens"
        )
    if len(kept) < 2:
        raise ConfigError(f"{trace.name} has {len(kept)} requests of at most {longest} tokens; a plan needs some hundred")
    if (tick_s := find_tick(kept)) > 0:
        kept = _spread(kept, tick_s, seed)
        notes.append(f"arrivals are spread inside the clock's ticks of {tick_s:.3g} s")
    own_rate = _rate(kept)
    speed = rate / own_rate if rate else 1.0
    num = min(num_requests or enough(kept, cost, slo, num_instances), len(kept))
    first = _busiest(kept, num, cost)
    window = kept[first : first + num]
    if num < len(kept):
        rates = f"{_rate(window) * speed:.3g} a second; all {len(kept)} have {own_rate * speed:.3g}"
        notes.append(f"simulated are the busiest {num} requests in a row, {rates}")
    if num < FEWEST:
        notes.append(f"{num} requests are few: a share of them in SLO is uncertain by {100 / num**0.5:.0f} points")
    start_s = window[0].arrival_s
    end_s = kept[first + num].arrival_s if first + num < len(kept) else window[-1].arrival_s + 1e-6
    options = ReplayOptions(start_s=start_s, duration_s=max(end_s - start_s, 1e-6), warm_s=WARM_S, seed=seed)
    warm = [one for one in kept[:first] if one.arrival_s >= start_s - WARM_S]
    cut = Trace(trace.name, trace.sha256, (*warm, *window))
    return Window(cut, options, len(window), _rate(window), speed, _work(warm, window, cost), tuple(notes))


def enough(requests: list[TraceRequest], cost: CostModel, slo: Slo, num_instances: int) -> int:
    """Requests that arrive in LIFETIMES of an answer, where they keep all instances busy."""
    num_input, num_output = mean_lengths(requests)
    most_a_second = num_instances / busy_s(num_input, num_output, cost)
    return min(max(round(LIFETIMES * num_output * slo.tpot_s * most_a_second), FEWEST), MOST)


def mean_lengths(requests: Sequence[TraceRequest]) -> tuple[float, float]:
    """Prompt and answer tokens of a request."""
    num_input, num_output = (sum(getattr(one, side) for one in requests) for side in ("num_input_tokens", "num_output_tokens"))
    return num_input / len(requests), num_output / len(requests)


def _rate(requests: list[TraceRequest]) -> float:
    return (len(requests) - 1) / max(requests[-1].arrival_s - requests[0].arrival_s, 1e-6)


def _spread(requests: list[TraceRequest], tick_s: float, seed: int) -> list[TraceRequest]:
    draw = random.Random(seed)
    moved = [one._replace(arrival_s=one.arrival_s + draw.uniform(0.0, tick_s)) for one in requests]
    return sorted(moved, key=lambda one: one.arrival_s)


def _busiest(requests: list[TraceRequest], num: int, cost: CostModel) -> int:
    """Where num requests in a row have the most work a second."""
    work = [busy_s(one.num_input_tokens, one.num_output_tokens, cost) for one in requests]
    starts = range(0, len(requests) - num + 1, max(num // 4, 1))
    spans = {at: requests[at + num - 1].arrival_s - requests[at].arrival_s for at in starts}
    return max(starts, key=lambda at: sum(work[at : at + num]) / max(spans[at], 1e-6))


def _work(warm: list[TraceRequest], window: list[TraceRequest], cost: CostModel) -> float:
    num_input, num_output = mean_lengths(window)
    hits = ideal_hits([*warm, *window]).tokens_ratio * sum(one.num_input_tokens for one in (*warm, *window))
    hits -= ideal_hits(warm).tokens_ratio * sum(one.num_input_tokens for one in warm)
    return busy_s(num_input - hits / len(window), num_output, cost) * _rate(window)
