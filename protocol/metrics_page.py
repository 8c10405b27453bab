"""python -m halfmoon.protocol.metrics_page: docs/metrics.md, made from protocol/metrics.py. A test compares what is committed."""

from __future__ import annotations

from pathlib import Path

from . import metrics
from .metrics import MetricSpec, Process

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """# Metrics

Made from [protocol/metrics.py](../protocol/metrics.py) by `python -m halfmoon.protocol.metrics_page`; edit there.

`GET /metrics/targets` at `proxy.metrics_port` lists every process's page, in the form of Prometheus' `http_sd_configs`;
`halfmoon status --json` and the SDK have the addresses, too. `halfmoon dashboards up` runs Prometheus with [the
rules](../deploy/prometheus) for a cluster; [deploy/grafana](../deploy/grafana) holds the dashboards.

Every series carries `worker` (the process's id: `proxy`, `prefill-0`, `store-0`), `role` (that it has now) and `model_name`. Where a
metric has a `role` of its own, that is the role in which the work was done, or that of the members counted. A worker that takes on
another role goes on under the new label. Scrape with `honor_labels: true`: targets carry the same three labels. Counters end in `_total`
there, histograms in `_bucket`, `_sum` and `_count`. A scraper that asks for OpenMetrics gets exemplars: the trace of a time to the first
token, where the request had one. `process_*` is what Prometheus' client library says of CPU, memory and files.

A time to the first token ends, and a gap between tokens is measured, when the tokens have been written to the client's connection; the
`write` phase is what the first of them waited for that. A request is judged once, at its end, by its own bounds: goodput is the rate of
`halfmoon_requests_total{in_slo="yes"}`.
"""
TITLES: dict[Process, str] = {"proxy": "The proxy", "worker": "Workers", "store": "Stores", "every": "Every process"}


def page() -> str:
    return HEAD + "".join(_section(process, title) for process, title in TITLES.items())


def _section(process: Process, title: str) -> str:
    rows = [_row(spec) for spec in metrics.ALL if spec.process == process]
    return "\n".join([f"\n## {title}\n", "| metric | kind | labels of its own | what it is |", "|---|---|---|---|", *rows, ""])


def _row(spec: MetricSpec) -> str:
    name = f"{spec.name}_total" if spec.kind == "counter" else spec.name
    what = spec.help.replace("|", "\\|")
    return f"| `{name}` | {spec.kind} | {', '.join(f'`{label}`' for label in spec.labels)} | {what} |"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
