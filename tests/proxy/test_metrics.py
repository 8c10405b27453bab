"""Percentiles by an independent rule, and labels that a client cannot choose."""

from __future__ import annotations

import statistics

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from halfmoon.protocol.errors import ERROR_TYPES
from halfmoon.proxy.metrics import WINDOW_LEN, LatencyWindow, ProxyMetrics
from halfmoon.proxy.request import RequestState
from halfmoon.proxy.verdict import Verdict


def test_percentiles_are_values_that_were_seen_and_nearly_those_of_statistics() -> None:
    window = LatencyWindow()
    assert window.percentiles().count == 0
    values = [(n * 7919 % 1000) / 1000 for n in range(1000)]
    for value in values:
        window.add(value)
    found = window.percentiles()
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert (found.p50, found.p90, found.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]), abs=0.0011)
    assert {found.p50, found.p90, found.p99} <= set(values) and found.count == 1000


def test_one_value_is_every_percentile_and_old_values_leave() -> None:
    window = LatencyWindow()
    for n in range(WINDOW_LEN):
        window.add(100.0 + n)
    for _ in range(WINDOW_LEN):
        window.add(3.0)
    found = window.percentiles()
    assert (found.p50, found.p90, found.p99, found.count) == (3.0, 3.0, 3.0, WINDOW_LEN)


def test_tokens_that_came_together_share_their_gap() -> None:
    registry = CollectorRegistry()
    metrics = ProxyMetrics(registry)
    metrics.tokens_written(1, None)
    metrics.tokens_written(4, 0.02)
    assert registry.get_sample_value("halfmoon_inter_token_latency_seconds_count") == 4
    assert registry.get_sample_value("halfmoon_inter_token_latency_seconds_sum") == pytest.approx(0.02)
    assert registry.get_sample_value("halfmoon_inter_token_latency_seconds_bucket", {"le": "0.006"}) == 4
    assert registry.get_sample_value("halfmoon_generation_tokens_total") == 5


def test_the_exported_text_holds_error_codes_and_states_only() -> None:
    registry = CollectorRegistry()
    metrics = ProxyMetrics(registry)
    metrics.ended(RequestState.FAILED, "worker_lost", Verdict("none", "no", "error"))
    metrics.ended(RequestState.DONE, "stop", Verdict("none", "yes", "none"))
    text = generate_latest(registry).decode()
    labels = 'class="none",in_slo="no",miss="error",outcome="failed",reason="worker_lost"'
    assert f"halfmoon_requests_total{{{labels}}} 1.0" in text
    assert "worker_lost" in ERROR_TYPES
    assert metrics.outcomes == {"failed": 1, "done": 1}


def test_goodput_and_attainment_are_counts_of_verdicts() -> None:
    registry = CollectorRegistry()
    metrics = ProxyMetrics(registry)
    for verdict in (
        Verdict("own", "yes", "none", True, True),
        Verdict("own", "no", "tpot", True, False),
        Verdict("default", "no", "rejected", False, None),
        Verdict("none", "yes", "none"),
    ):
        metrics.ended(RequestState.DONE, "stop", verdict)
    counted = [sample for family in registry.collect() for sample in family.samples if sample.name == "halfmoon_slo_requests_total"]
    assert {(one.labels["slo"], one.labels["class"], one.labels["met"]): one.value for one in counted if one.value} == {
        ("ttft", "own", "yes"): 2,
        ("tpot", "own", "yes"): 1,
        ("tpot", "own", "no"): 1,
        ("ttft", "default", "no"): 1,
    }
    assert (metrics.num_in_slo, metrics.num_outside_slo) == (1, 2), "one without an SLO is neither"
