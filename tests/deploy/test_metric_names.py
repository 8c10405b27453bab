"""Dashboards and rules name only what a process exports, and every process exports what protocol/metrics.py says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from halfmoon.protocol import metrics
from halfmoon.protocol.exporter import Identity, ProcessMetrics
from halfmoon.tests.deploy.registries import proxy_registry, store_registry, worker_registry

DEPLOY = Path(__file__).parents[2] / "deploy"
SUFFIXES = ("_total", "_bucket", "_sum", "_count")
SCRAPE_LABELS = {"job", "instance", "le", *metrics.IDENTITY_LABELS}
PROCESS_FAMILIES = {
    *("process_cpu_seconds", "process_resident_memory_bytes", "process_virtual_memory_bytes"),
    *("process_start_time_seconds", "process_open_fds", "process_max_fds"),
}


def families(registry: CollectorRegistry) -> set[str]:
    served = ProcessMetrics(registry, lambda: Identity("x", "y", "z"))
    return {family.name for family in served.collect()}


@pytest.mark.parametrize(
    ("process", "registry"),
    [("proxy", proxy_registry), ("worker", worker_registry), ("store", store_registry)],
)
async def test_a_process_exports_what_is_said_of_it_and_nothing_else(process: str, registry: Any) -> None:
    said = {spec.name for spec in metrics.ALL if spec.process in (process, "every")}
    assert families(registry()) == said | PROCESS_FAMILIES


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL)"""
    for path in sorted((DEPLOY / "prometheus").glob("*.yml")):
        for group in yaml.safe_load(path.read_text()).get("groups", []):
            for rule in group["rules"]:
                yield f"{path.name}: {rule.get('alert') or rule['record']}", rule["expr"]
    for path in sorted((DEPLOY / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.name}: {panel['title']}", target["expr"]


def known() -> dict[str, set[str]]:
    """Series name -> its own labels."""
    found: dict[str, set[str]] = {name: set() for name in ("up", "process_cpu_seconds_total", "process_resident_memory_bytes")}
    for spec in metrics.ALL:
        for suffix in {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[spec.kind]:
            found[spec.name + suffix] = set(spec.labels)
    for path in (DEPLOY / "prometheus").glob("*.yml"):
        for group in yaml.safe_load(path.read_text()).get("groups", []):
            for rule in group["rules"]:
                if "record" in rule:
                    found[rule["record"]] = {"slo", "tier"}
    return found


def wrong(query: str) -> list[str]:
    """The metrics of a query that are not exported, and the labels that its metrics do not have."""
    series = known()
    query = re.sub(r"\$__rate_interval", "5m", query)
    named = re.findall(r"\b(?:halfmoon[\w:]*|process_\w+|up\b)", re.sub(r'"[^"]*"', '""', query))
    found = [f"no process exports {name}" for name in named if name not in series]
    labels = SCRAPE_LABELS.union(*(series.get(name, set()) for name in named))
    labels |= set(re.findall(r'label_replace\(.*?, "(\w+)"', query))
    used = [
        label for group in re.findall(r"(?:by|on|group_left|ignoring) \(([^)]*)\)", query) for label in re.split(r"[,\s]+", group) if label
    ]
    for name, selector in re.findall(r"\b(halfmoon\w*|process_\w+|up)\{([^}]*)\}", query):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', selector)):
            if label not in series.get(name, set()) | SCRAPE_LABELS:
                found.append(f"{name} has no label {label}")
    return found + [f"no metric of the query has the label {label}" for label in used if label not in labels]


@pytest.mark.parametrize(("where", "query"), list(queries()))
def test_a_query_names_only_metrics_and_labels_that_are_exported(where: str, query: str) -> None:
    assert wrong(query) == []


def test_a_metric_or_label_that_nobody_exports_is_found() -> None:
    assert wrong("rate(halfmoon_goodput_requests_total[5m])") == ["no process exports halfmoon_goodput_requests_total"]
    assert wrong('halfmoon_members{kind="prefill"}') == ["halfmoon_members has no label kind"]
    assert wrong("sum by (tenant) (halfmoon_members)") == ["no metric of the query has the label tenant"]


def test_the_committed_dashboards_are_those_of_the_code(tmp_path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    from halfmoon.deploy.dashboards.write import write

    for path in write(tmp_path):
        assert path.read_text() == (DEPLOY / "grafana" / path.name).read_text(), "run python -m halfmoon.deploy.dashboards.write"
