from __future__ import annotations

import gzip
import urllib.request
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from halfmoon.protocol import exporter, metrics, metrics_page
from halfmoon.protocol.exporter import Identity, ProcessMetrics

SPECS = metrics.ALL


def test_names_are_unique_and_carry_the_prefix_and_histograms_resolve_a_millisecond() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    for spec in SPECS:
        assert spec.name.startswith("halfmoon_") and not spec.name.endswith("_total")
        if spec.kind == "histogram":
            assert not spec.name.endswith("_seconds") or spec.buckets[0] == 0.001
            assert list(spec.buckets) == sorted(set(spec.buckets))


def test_every_metric_is_served_under_its_name() -> None:
    registry = CollectorRegistry()
    for spec in SPECS:
        getattr(exporter, spec.kind)(spec, registry)
    address, stop = exporter.serve_metrics(registry, "127.0.0.1")
    try:
        text = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    finally:
        stop()
    served = {family.name for family in text_string_to_metric_families(text)}
    assert {name for name in served if not name.endswith("_created")} == {spec.name for spec in SPECS}


def asked(served: ProcessMetrics, headers: dict[str, str] | None = None) -> tuple[bytes, Any]:
    """A scrape: the page's bytes and headers."""
    address, stop = exporter.serve_metrics(served, "127.0.0.1")
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://{address}/metrics", headers=headers or {})) as reply:
            return reply.read(), reply.headers
    finally:
        stop()


def test_every_series_carries_its_process_and_a_metrics_own_role_stands() -> None:
    registry = CollectorRegistry()
    exporter.gauge(metrics.KV_CACHE_USAGE, registry).set(0.5)
    exporter.counter(metrics.STEP_TOKENS, registry).labels("prefill").inc(7)
    role = "both"
    served = ProcessMetrics(registry, lambda: Identity("worker-3", role, "tiny"))
    page = asked(served)[0].decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for family in families.values():
        assert all(set(sample.labels) >= set(metrics.IDENTITY_LABELS) for sample in family.samples), family.name
    assert families["halfmoon_kv_cache_usage_ratio"].samples[0].labels == {"worker": "worker-3", "role": "both", "model_name": "tiny"}
    assert families["halfmoon_step_tokens"].samples[0].labels["role"] == "prefill"
    assert families["halfmoon_build_info"].samples[0].labels["python"]
    assert families["process_resident_memory_bytes"].samples[0].value > 2**20 and not any("_created" in name for name in families)
    role = "decode"
    assert 'role="decode"' in asked(served)[0].decode(), "the role that it has now"


def test_a_scraper_that_asks_for_openmetrics_gets_exemplars_and_gzip_where_it_may() -> None:
    registry = CollectorRegistry()
    exporter.histogram(metrics.TIME_TO_FIRST_TOKEN, registry).observe(0.03, {"trace_id": "ab" * 16})
    served = ProcessMetrics(registry, lambda: Identity("proxy", "proxy", "tiny"))
    openmetrics = {"accept": "application/openmetrics-text; version=1.0.0,text/plain;q=0.5", "accept-encoding": "gzip, deflate"}
    content, headers = asked(served, openmetrics)
    assert headers["content-type"].startswith("application/openmetrics-text") and headers["content-encoding"] == "gzip"
    found = {family.name: family for family in parse_openmetrics(gzip.decompress(content).decode())}
    exemplars = [one.exemplar for one in found["halfmoon_time_to_first_token_seconds"].samples if one.exemplar]
    assert [one.labels for one in exemplars] == [{"trace_id": "ab" * 16}] and exemplars[0].value == 0.03
    assert "exemplar" not in asked(served, {"accept": "text/plain"})[0].decode()


def test_the_metrics_page_is_made_from_the_code() -> None:
    assert metrics_page.PAGE.read_text() == metrics_page.page(), "run python -m halfmoon.protocol.metrics_page"
    assert all(f"`{spec.name}{'_total' if spec.kind == 'counter' else ''}`" in metrics_page.page() for spec in SPECS)
