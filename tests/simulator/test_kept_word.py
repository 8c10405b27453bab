"""First tokens come as they were predicted, and nine of ten within what was promised, on loads near saturation."""

from __future__ import annotations

import numpy as np
import pytest

from halfmoon.proxy.conductor.placement import Slo
from halfmoon.simulator.cluster import simulate
from halfmoon.simulator.grid import LOADS, busy_s
from halfmoon.simulator.outcome import Result
from halfmoon.simulator.replay import ReplayOptions, replay
from halfmoon.simulator.scenario import Scenario, find_cost_model


@pytest.mark.parametrize(
    ("load", "cost_model", "coupled", "rate", "slo"),
    [("chat", "h100-8b", True, 1.0, Slo(1.0, 0.015)), ("code", "h100-70b-tp8", False, 0.4, Slo(2.0, 0.02))],
)
def test_predictive_keeps_its_word(load: str, cost_model: str, coupled: bool, rate: float, slo: Slo) -> None:
    cost, shape = find_cost_model(cost_model), LOADS[load]
    scenario = Scenario(
        cost=cost,
        num_prefill=1,
        num_decode=1,
        coupled=coupled,
        slo=slo,
        admission="predictive",
        learn=True,
        step_jitter=0.03,
        report_s=0.05,
    )
    per_s = rate * 2 / busy_s(shape.num_input_tokens, shape.num_output_tokens, cost)
    result = Result(simulate(scenario, replay(shape.make(700, per_s, seed=1), ReplayOptions())))
    served = [row for row in result.rows if row.outcome == "done"]
    predicted, promised = (
        np.array([row.ttft_s / getattr(row, name) for row in served]) for name in ("predicted_ttft_s", "promised_ttft_s")
    )
    assert len(served) > 500 and result.num_rejected() > 0, "the load is near what there is"
    assert 0.85 < float(np.median(predicted)) < 1.15
    assert float(np.quantile(promised, 0.9)) < 1.1
    assert float(np.mean([row.ttft_s > slo.ttft_s for row in served])) < 0.03
