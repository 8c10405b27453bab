"""Percentiles by an independent rule, and labels that a client cannot choose."""

from __future__ import annotations

import statistics

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from halfmoon.protocol.errors import ERROR_TYPES
from halfmoon.proxy.metrics import WINDOW_LEN, LatencyWindow, ProxyMetrics
from halfmoon.proxy.request import RequestState


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
    metrics.tokens_sent(1, None)
    metrics.tokens_sent(4, 0.02)
    assert registry.get_sample_value("halfmoon_inter_token_latency_seconds_count") == 4
    assert registry.get_sample_value("halfmoon_inter_token_latency_seconds_sum") == pytest.approx(0.02)
    assert registry.get_sample_value("halfmoon_inter_token_latency_seconds_bucket", {"le": "0.006"}) == 4
    assert registry.get_sample_value("halfmoon_generation_tokens_total") == 5


def test_the_exported_text_holds_error_codes_and_states_only() -> None:
    registry = CollectorRegistry()
    metrics = ProxyMetrics(registry)
    metrics.ended(RequestState.FAILED, "worker_lost")
    metrics.ended(RequestState.DONE, "stop")
    text = generate_latest(registry).decode()
    assert 'halfmoon_requests_total{outcome="failed",reason="worker_lost"} 1.0' in text
    assert "worker_lost" in ERROR_TYPES
    assert metrics.outcomes == {"failed": 1, "done": 1}
