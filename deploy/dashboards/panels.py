"""Panels of the dashboards: a title, a unit, queries, and one sentence on what to look for.

events(...) is for what may never have happened: it is 0 where the proxy is scraped, and absent where it is not.
"""

from __future__ import annotations

from typing import NamedTuple

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models.common import GraphTresholdsStyleMode, LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, ThresholdsMode

HEIGHT = 7  # rows of the grid
WIDTH = 24  # its columns
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
WINDOW = "$__rate_interval"


class Query(NamedTuple):
    expr: str
    legend: str


def rate(metric: str, *by: str, where: str = "") -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}{{{where}}}[{WINDOW}]))"


def mean(histogram: str, *by: str, where: str = "") -> str:
    """By its sum and count: exact."""
    return f"{rate(histogram + '_sum', *by, where=where)} / {rate(histogram + '_count', *by, where=where)}"


def quantiles(histogram: str, *shares: float, where: str = "") -> list[Query]:
    buckets = rate(f"{histogram}_bucket", "le", where=where)
    return [Query(f"histogram_quantile({share}, {buckets})", f"p{share * 100:g}") for share in shares]


def quantile(histogram: str, share: float, *by: str) -> Query:
    return Query(f"histogram_quantile({share}, {rate(f'{histogram}_bucket', 'le', *by)})", " ".join(f"{{{{{label}}}}}" for label in by))


def events(metric: str, label: str, *more: str, where: str = "") -> Query:
    """A second, by labels; `none` at 0 where there were none yet."""
    zero = f'label_replace(0 * max(halfmoon_build_info{{role="proxy"}}), "{label}", "none", "", "")'
    legend = " ".join(f"{{{{{name}}}}}" for name in (label, *more))
    return Query(f"{rate(metric, label, *more, where=where)} or {zero}", legend)


def series(title: str, unit: str, look: str, *queries: Query, width: int = 8, stacked: bool = False, limits: list[float] | None = None):
    """Lines over time. limits: drawn as lines."""
    panel = timeseries.Panel().title(title).description(look).unit(unit).datasource(SOURCE).span(width).height(HEIGHT)
    panel = panel.line_width(2).fill_opacity(60 if stacked else 0).min(0)
    panel = panel.legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True))
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if limits:
        steps = [Threshold(value=None, color="transparent"), *(Threshold(value=limit, color="red") for limit in limits)]
        panel = panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    for number, query in enumerate(queries):
        panel = panel.with_target(_target(query, number))
    return panel


def number(title: str, unit: str, look: str, query: Query, *, red_below: float | None = None, width: int = 4):
    """The newest value. red_below: green from there on."""
    panel = stat.Panel().title(title).description(look).unit(unit).datasource(SOURCE).span(width).height(4)
    if red_below is not None:
        steps = [Threshold(value=None, color="red"), Threshold(value=red_below, color="green")]
        panel = panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    return panel.with_target(_target(query, 0).instant())


def bars(title: str, unit: str, look: str, *queries: Query, width: int = 8):
    """The newest values beside each other, in the queries' order."""
    panel = bargauge.Panel().title(title).description(look).unit(unit).datasource(SOURCE).span(width).height(HEIGHT).min(0)
    for number_of, query in enumerate(queries):
        panel = panel.with_target(_target(query, number_of).instant())
    return panel


def board(title: str, uid: str, description: str) -> dashboard.Dashboard:
    source = dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus")
    found = dashboard.Dashboard(title).uid(uid).description(description).tags(["halfmoon"])
    return found.refresh("10s").time("now-30m", "now").timezone("browser").with_variable(source)


def _target(query: Query, number_of: int) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + number_of))
