"""Aggregates against counts by hand."""

from __future__ import annotations

import pytest

from halfmoon.deploy.load.client_lag import LagMeter, client_lag
from halfmoon.deploy.load.sample import Outcome, Sample
from halfmoon.deploy.load.summary import Slo, attainment, meets, spread, summarise
from halfmoon.protocol.errors import ConfigError


def sample(
    ttft_s: float, gaps_s: list[float], outcome: Outcome = "ok", *, due_s: float = 0.0, measured: bool = True, cached: int | None = 0
) -> Sample:  # fmt: skip
    arrivals = [ttft_s]
    for gap in gaps_s:
        arrivals.append(arrivals[-1] + gap)
    return Sample(
        0, "r", 0, due_s, 0.0, 100, len(arrivals), measured, outcome, "" if outcome == "ok" else "why", arrivals_s=arrivals,
        e2e_s=arrivals[-1], prompt_tokens=100, completion_tokens=len(arrivals), cached_tokens=cached,
    )  # fmt: skip


SLO = Slo(1.0, 0.1)
GOOD = sample(0.5, [0.0625] * 10)
LATE = sample(1.5, [0.0625] * 10)
SLOW = sample(0.5, [0.2] * 10)
BUMPY = sample(0.5, [0.05] * 9 + [0.5])  # mean 95 ms, its longest tenth 500 ms


def test_attainment_by_hand() -> None:
    samples = [GOOD, GOOD, LATE, SLOW, BUMPY, sample(0.1, [], "refused"), sample(0.1, [], "timed_out"), sample(0.1, [], "error")]
    assert attainment(samples, SLO) == pytest.approx(3 / 8)
    assert attainment(samples, SLO, tail=True) == pytest.approx(2 / 8)


def test_who_left_on_purpose_or_came_outside_the_window_is_not_asked() -> None:
    samples = [GOOD, LATE, sample(9.0, [], "cancelled"), sample(9.0, [], measured=False)]
    assert attainment(samples, SLO) == pytest.approx(1 / 2)


def test_limits_are_inside_and_an_answer_of_one_token_needs_no_pace() -> None:
    assert meets(sample(1.0, [0.0625]), Slo(1.0, 0.0625), tail=False) and meets(sample(0.9, []), SLO, tail=True)


def test_a_summary_counts_what_ended_how_and_over_which_time() -> None:
    samples = [
        sample(0.5, [0.1] * 5, due_s=10.0, cached=60),
        sample(0.5, [0.1] * 5, due_s=14.0, cached=0),
        sample(2, [], "refused", due_s=11),
    ]
    found = summarise([*samples, sample(0.5, [], due_s=0.0, measured=False)], [SLO, Slo(0.1, 0.1)])
    assert found["outcomes"] == {"ok": 2, "refused": 1, "error": 0, "timed_out": 0, "cancelled": 0} and found["errors"] == {"why": 1}
    assert found["span_s"] == pytest.approx(5.0)  # from 10 s on to 14 + 1 s
    assert found["requests_per_s"] == pytest.approx(2 / 5) and found["output_tokens_per_s"] == pytest.approx(12 / 5)
    assert found["prefix_hit_ratio"] == pytest.approx(60 / 200)
    assert [slo["attainment"] for slo in found["slos"]] == pytest.approx([2 / 3, 0.0])
    assert found["slos"][0]["good_requests_per_s"] == pytest.approx(2 / 5)


def test_phases_are_the_servers_and_counts_among_them_are_left_out() -> None:
    samples = [sample(0.5, [0.1]) for _ in range(3)]
    for number, one in enumerate(samples):
        one.phases = {"index": 0, "prefill_s": float(number), "ttft_s": 0.25, "prefill_worker": "p", "num_attempts": 1}
    phases = summarise(samples, [SLO])["phases"]
    assert set(phases) == {"prefill_s", "ttft_s", "ttft_beyond_server_s"} and phases["ttft_beyond_server_s"]["max"] == pytest.approx(0.25)
    assert phases["prefill_s"]["mean"] == 1.0 and phases["prefill_s"]["p50"] == 1.0


def test_a_spread_is_linear_between_neighbours_and_none_of_nothing() -> None:
    found = spread([float(number) for number in range(101)])
    assert found is not None and [found[name] for name in ("mean", "p50", "p90", "p95", "p99", "max")] == [50, 50, 90, 95, 99, 100]
    assert spread([None]) is None and summarise([], [SLO])["ttft_s"] is None


@pytest.mark.parametrize("text", ["2", "2:x", "0:1", "1:2:3", "-1:0.1"])
def test_what_is_no_slo_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="SLO"):
        Slo.parse(text)


def test_a_client_that_kept_up_is_not_the_bottleneck() -> None:
    assert client_lag(LagMeter([0.001] * 100, 0.3), [0.001] * 50, 0.2, 0.02)["limited_by"] == []


@pytest.mark.parametrize(
    ("gaps_s", "cpu", "late_s", "told"),
    [([0.001] * 90 + [0.02] * 10, 0.3, [0.0], "event loop"), ([0.0], 0.95, [0.0], "core"), ([0.0], 0.3, [0.0] * 9 + [0.1], "late")],
)
def test_a_client_that_did_not_is_told_with_the_reason(gaps_s: list[float], cpu: float, late_s: list[float], told: str) -> None:
    (reason,) = client_lag(LagMeter(gaps_s, cpu), late_s, 0.2, 0.02)["limited_by"]
    assert told in reason
