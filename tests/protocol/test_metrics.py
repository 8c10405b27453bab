from __future__ import annotations

import urllib.request

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from halfmoon.protocol import exporter, metrics
from halfmoon.protocol.metrics import MetricSpec

SPECS = [value for value in vars(metrics).values() if isinstance(value, MetricSpec)]


def test_names_are_unique_and_carry_the_prefix_and_histograms_resolve_a_millisecond() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    for spec in SPECS:
        assert spec.name.startswith("halfmoon_") and not spec.name.endswith("_total")
        if spec.kind == "histogram":
            assert spec.buckets[0] == 0.001 and list(spec.buckets) == sorted(set(spec.buckets))


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
