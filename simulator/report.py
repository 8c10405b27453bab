"""A run's result for people and for programs: a rich table, a CSV of requests, a JSON of figures."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Group
from rich.table import Table

from ..proxy.conductor.placement import Slo
from .outcome import Quantiles, Result, Row
from .replay import ReplayOptions
from .scenario import Scenario
from .sweep import SweepRow
from .trace import Ceiling, Trace


def summary_table(result: Result, scenario: Scenario, ceiling: Ceiling) -> Group:
    figures = result.summary(scenario.slo)
    table = Table(
        title=f"{scenario.title} · admission {scenario.admission} (simulated, {scenario.cost.name or 'own cost model'})",
        title_justify="left",
    )
    table.add_column("")
    for name in ("mean", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for what, unit, scale in (("ttft_s", "s", 1.0), ("tbt_s", "ms", 1e3), ("tpot_s", "ms", 1e3), ("e2e_s", "s", 1.0)):
        quantiles: Quantiles = result.quantiles(what)
        table.add_row(f"{what[:-2].upper()}, {unit}", *(f"{value * scale:.2f}" for value in quantiles))
    slo = f"TTFT {scenario.slo.ttft_s:g} s, {scenario.slo.tpot_s * 1e3:g} ms"
    by_tpot, by_tbt = figures["attainment"], figures["attainment_by_tbt"]
    rows = [
        (f"in SLO ({slo})", f"{by_tpot:.1%} of {result.num_requests} by the mean TPOT, {by_tbt:.1%} by the longest tenth of gaps"),
        ("rejected at arrival / after prefill", f"{figures['num_rejected_at_arrival']:.0f} / {figures['num_rejected_at_decode']:.0f}"),
        ("prompt tokens from caches", f"{figures['hit_tokens_ratio']:.1%} (the trace's ceiling {ceiling.tokens_ratio:.1%})"),
        ("prefill a request", f"{figures['prefill_s_per_request']:.3f} s, wasted in all {figures['wasted_prefill_s']:.0f} s"),
        ("moved: hand-offs / prefixes", f"{figures['handoff_gb']:.0f} / {figures['prefix_gb']:.0f} GB"),
        ("read from SSD", f"{figures['ssd_gb']:.0f} GB"),
        ("role changes, preemptions", f"{figures['num_role_changes']:.0f}, {figures['num_preemptions']:.0f}"),
        ("requests that were replayed after a failure", f"{sum(row.num_attempts > 1 for row in result.rows)}"),
        ("steps simulated", f"{figures['num_steps']:.0f}"),
    ]
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(name, value)
    return Group(table, grid)


def write_csv(result: Result, path: Path) -> None:
    """A line a request, in order of arrival."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(result.rows)


def write_sweep_csv(rows: Sequence[SweepRow], path: Path) -> None:
    """A line a scenario: each figure's mean over the seeds, and its deviation."""
    names = list(rows[0].figures) if rows else []
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scenario", "admission", *names, *(f"{name}_sd" for name in names)])
        for row in rows:
            means, sds = ([found[name] for name in names] for found in (row.figures, row.sds))
            writer.writerow([row.scenario.title, row.scenario.admission, *means, *sds])


def figures(result: Result, scenario: Scenario, options: ReplayOptions, trace: Trace, ceiling: Ceiling) -> dict[str, Any]:
    """What the run was and what it showed, plain."""
    return {
        "trace": {"name": trace.name, "sha256": trace.sha256, "num_requests": len(trace.requests), "ceiling": ceiling._asdict()},
        "replay": _plain(dataclasses.asdict(options)),
        "scenario": _plain(dataclasses.asdict(scenario) | {"slo": scenario.slo._asdict()}),
        "kind": "simulated",
        "result": result.summary(scenario.slo),
    }


def write_json(found: Any, path: Path) -> None:
    path.write_text(json.dumps(_plain(found), indent=2) + "\n")


def slo_text(slo: Slo) -> str:
    return f"{slo.ttft_s:g} s / {slo.tpot_s * 1e3:g} ms"


def _plain(value: Any) -> Any:
    """JSON has no infinity: as text."""
    if isinstance(value, dict):
        return {key: _plain(found) for key, found in cast(dict[str, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(found) for found in cast(Sequence[Any], value)]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value
