"""Pictures of the dashboards without Grafana: their JSON, Prometheus' answers, matplotlib. For docs and for a look on one machine.

JSON ─► panels on the grid ─► query_range | query ─► lines, stacked areas, bars, numbers
"""

from __future__ import annotations

import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 120  # points of a line
RATE_WINDOW = "1m"
COLOURS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0", "#508642", "#cca300")


class Series(NamedTuple):
    legend: str
    times: list[float]  # seconds before the end, negative
    values: list[float]


class Source:
    """Prometheus' HTTP API. address: "http://host:port"."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, target: dict[str, Any], span_s: float, end: float | None = None) -> list[Series]:
        """What a panel's target shows of the span_s before end, of time.time(); None: now. An instant one gives a single value each."""
        end, expr = time.time() if end is None else end, target["expr"].replace("$__rate_interval", RATE_WINDOW)
        if target.get("instant"):
            found = self._get("query", query=expr, time=end)
            return [Series(_legend(target, one["metric"]), [0.0], [float(one["value"][1])]) for one in found]
        found = self._get("query_range", query=expr, start=end - span_s, end=end, step=max(span_s / STEPS, 1.0))
        return [
            Series(_legend(target, one["metric"]), [at - end for at, _ in one["values"]], [float(value) for _, value in one["values"]])
            for one in found
        ]

    def _get(self, kind: str, **parameters: Any) -> list[dict[str, Any]]:
        url = f"{self._address}/api/v1/{kind}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url) as reply:  # nosec B310
            return json.load(reply)["data"]["result"]


def draw(board: Path, source: Source, span_s: float, picture: Path) -> None:
    """One dashboard's picture, its rows one below the other."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = json.loads(board.read_text())
    panels = found["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    with plt.rc_context({"font.size": 7, "axes.edgecolor": "#bbbbbb", "axes.linewidth": 0.6, "axes.titlesize": 8}):
        figure = plt.figure(figsize=(13, height * 0.32), dpi=90)
        end = time.time()  # one for all: stacked series need the same times
        for panel in panels:
            _place(figure, panel, height, lambda target: source.ask(target, span_s, end))
        figure.suptitle(found["title"], x=0.012, y=1.0, ha="left", va="top", fontsize=11, weight="bold")
        figure.savefig(picture, bbox_inches="tight", pad_inches=0.12)
        plt.close(figure)


def _place(figure: Any, panel: dict[str, Any], height: int, ask: Callable[[dict[str, Any]], list[Series]]) -> None:
    grid = panel["gridPos"]
    left, top = grid["x"] / 24, 1 - (grid["y"] + 1.5) / (height + 1.5)
    if panel["type"] == "row":
        figure.text(left + 0.004, top - 0.9 / (height + 1.5), panel["title"], fontsize=9, weight="bold", color="#444444", va="bottom")
        return
    width, tall = grid["w"] / 24, grid["h"] / (height + 1.5)
    axes = figure.add_axes((left + 0.034, top - tall + 1.7 / (height + 1.5), width - 0.046, tall - 2.8 / (height + 1.5)))
    axes.set_title(panel["title"], loc="left", pad=3, color="#222222")
    series = [one for target in panel["targets"] for one in ask(target)]
    defaults = panel["fieldConfig"]["defaults"]
    paint = {"stat": _number, "bargauge": _bars}.get(panel["type"], _lines)
    if series:
        paint(axes, defaults, series)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no data here", ha="center", color="#999999")


def _lines(axes: Any, defaults: dict[str, Any], series: list[Series]) -> None:
    custom, unit = defaults.get("custom", {}), _unit(defaults)
    if custom.get("stacking"):
        times = sorted({at for one in series for at in one.times})
        rows = [[dict(zip(one.times, one.values, strict=True)).get(at, 0.0) for at in times] for one in series]
        rows = [[value if value == value else 0.0 for value in row] for row in rows]  # NaN: nothing happened
        axes.stackplot(times, rows, colors=COLOURS, labels=[one.legend for one in series], alpha=0.8)
    else:
        for number, one in enumerate(series):
            axes.plot(one.times, one.values, color=COLOURS[number % len(COLOURS)], linewidth=1.3, label=one.legend)
    highest = max((value for one in series for value in one.values if value == value), default=0.0)
    for step in defaults.get("thresholds", {}).get("steps", []):
        if step.get("value") is not None and step["value"] <= 2 * highest:
            axes.axhline(step["value"], color="#cc3333", linestyle="--", linewidth=0.8)
    axes.set_ylim(bottom=0.0, top=None if highest > 0 else 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: unit(value))
    per_unit, name = (60, "min") if min(one.times[0] for one in series if one.times) < -300 else (1, "s")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / per_unit:.0f} {name}" if value else "now")
    axes.grid(True, color="#e8e8e8", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    shown = min(len(series), 8)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[:shown], labels[:shown], loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4, fontsize=6, frameon=False, columnspacing=1.0
    )


def _number(axes: Any, defaults: dict[str, Any], series: list[Series]) -> None:
    value, colour = series[0].values[-1], "#222222"
    for step in defaults.get("thresholds", {}).get("steps", []):
        if step.get("value") is None or value >= step["value"]:
            colour = {"green": "#2e8b57", "red": "#cc3333"}.get(step["color"], colour)
    axes.set_axis_off()
    axes.text(0.0, 0.35, _unit(defaults)(value), fontsize=17, weight="bold", color=colour, transform=axes.transAxes, va="center")


def _bars(axes: Any, defaults: dict[str, Any], series: list[Series]) -> None:
    unit = _unit(defaults)
    names, values = [one.legend for one in series], [one.values[-1] if one.values[-1] == one.values[-1] else 0.0 for one in series]
    places = range(len(series))
    axes.barh(places, values, color=[COLOURS[place % len(COLOURS)] for place in places], height=0.7)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, pad=-2, labelsize=6.5)
    axes.set_yticklabels(names, ha="left", color="#222222")
    axes.set_xticks([])
    axes.set_xlim(0, 1.35 * max(values, default=1.0) or 1.0)
    for place, value in zip(places, values, strict=True):
        axes.text(0.99, place, unit(value), va="center", ha="right", fontsize=6.5, transform=axes.get_yaxis_transform())
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), target.get("legendFormat", ""))
    return text.strip() or "value"


def _unit(defaults: dict[str, Any]) -> Callable[[float], str]:
    unit = defaults.get("unit", "short")
    if unit == "percentunit":
        return lambda value: f"{value * 100:,.0f} %" if abs(value) >= 10 else f"{value * 100:.3g} %"
    if unit == "s":
        return lambda value: f"{value:.3g} s" if abs(value) >= 1 else f"{value * 1e3:.3g} ms"
    suffix = {"reqps": "/s", "bytes": "B", "Bps": "B/s", "flops": "FLOP/s"}.get(unit, "")
    return lambda value: f"{_scaled(value)}{suffix}"


def _scaled(value: float) -> str:
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g} "
