"""deploy/cli/profile.py: what is printed of a profile."""

from __future__ import annotations

from rich.console import Console

from halfmoon.deploy.cli.profile import picture
from halfmoon.deploy.profile import Profile
from halfmoon.deploy.profile_fit import Facts, Points, PrefillPoint, StepPoint
from halfmoon.proxy.conductor.predictors import CostModel

MODEL = CostModel(
    name="tiny on cpu", per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=0.01, per_sequence_s=0.0,
    per_kv_token_s=0.0,
    kv_bytes_per_token=8192, num_layers=8, kv_capacity_tokens=4096, cache_tokens=8192, link_bytes_per_s=4e9, request_s=0.009, num_cores=2.0,
)  # fmt: skip


FACTS = Facts("tiny on cpu", 8192, 8, 4096, 8192, shares_cores=True)


def printed(points: Points) -> list[str]:
    console = Console(record=True, width=120)
    console.print(picture(Profile(MODEL, points, FACTS, 9, 12.0)))
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_every_case_is_a_line_with_its_median_its_fit_and_how_far_that_is_off() -> None:
    prefill = [PrefillPoint(64, 128, seconds) for seconds in (0.05, 0.08, 0.9)]
    lines = printed(Points(prefill, [StepPoint(2, 200, 0.008)], []))
    assert "prefill of 64 behind 128 0 80.0 ms 64.0 ms -20% 3" in lines
    assert "step of about 2, 64 tokens each 0 8.0 ms 10.0 ms +25% 1" in lines


def test_what_ran_beside_others_is_a_line_of_its_own_fitted_as_such() -> None:
    lines = printed(Points([PrefillPoint(64, 0, 0.1), PrefillPoint(64, 0, 0.128, busy=((4, 1.0),))], [], []))
    assert "prefill of 64 0 100.0 ms 64.0 ms -36% 1" in lines
    assert "prefill of 64 3 128.0 ms 128.0 ms +0% 1" in lines


def test_what_the_cluster_says_of_itself_is_told() -> None:
    lines = printed(Points([], [], []))
    assert "an instance's pages, a node's cache 4096, 8192 tokens" in lines
    assert any("2.00 workers of a machine" in line for line in lines)
