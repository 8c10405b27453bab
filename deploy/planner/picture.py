"""A plan's picture: what each finalist holds as the rate grows, all forms that were tried, and where the best one's time goes."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ...simulator.plots import load_pyplot
from .runner import Carried
from .sizing import Finalist, Plan
from .verdict import Question, headline
from .window import Window

COLOURS = {"coupled": "C0", "split": "C1", "adaptive": "C2"}


def write_png(asked: Question, window: Window, plan: Plan, path: Path) -> None:
    """Raises ConfigError where matplotlib is not installed."""
    pyplot = load_pyplot()
    figure, (curves, forms, busy) = pyplot.subplots(1, 3, figsize=(16, 5), gridspec_kw={"width_ratios": [5, 4, 4]})
    _curves(curves, asked, window, plan)
    _forms(forms, asked, plan)
    if plan.finalists:
        _busy(busy, asked, plan.finalists[0])
    else:
        busy.axis("off")
    figure.suptitle("\n".join(textwrap.wrap(f"{headline(asked, window, plan)} (simulated)", 150)), x=0.01, ha="left", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(axes: Any, asked: Question, window: Window, plan: Plan) -> None:
    target = asked.target
    for one in plan.finalists:
        rates, shares = _points(one.carried, window)
        axes.plot(rates, shares, "-o", markersize=4, color=COLOURS[one.form.kind], label=one.form.title)
    axes.axhline(100 * target.level, color="grey", linewidth=1, linestyle=":")
    load = window.needed_rate
    axes.axvline(load, color="black", linewidth=1)
    axes.axvline(load * (1 + target.margin), color="black", linewidth=1, linestyle="--")
    for rate, name in ((load, "load"), (load * (1 + target.margin), f"load + {target.margin:.0%}")):
        axes.text(rate, 3, f"{name} ", fontsize=9, ha="right", va="bottom", rotation=90)
    axes.set_ylim(0, 102)
    rates = [rate for one in plan.finalists for rate in _points(one.carried, window)[0]]
    axes.set_xlim(0, 1.08 * max([load * (1 + target.margin), *rates]))
    axes.set_xlabel("requests a second")
    axes.set_ylabel(f"in SLO {target.slo.ttft_s:g} s / {target.slo.tpot_s * 1e3:g} ms, %")
    if plan.finalists:
        axes.legend(loc="lower left")
    axes.grid(alpha=0.3)


def _points(carried: Carried, window: Window) -> tuple[list[float], list[float]]:
    return [speed * window.rate for speed, _ in carried.curve], [100 * share for _, share in carried.curve]


def _forms(axes: Any, asked: Question, plan: Plan) -> None:
    """The largest size on top, in it the best form."""
    tried = sorted(plan.tried, key=lambda one: (one.form.num_instances, one.seen.attainment))
    names = [f"{one.form.num_instances * asked.tp} GPUs: {one.form.title}" for one in tried]
    axes.barh(range(len(tried)), [100 * one.seen.attainment for one in tried], color=[COLOURS[one.form.kind] for one in tried])
    axes.set_yticks(range(len(tried)), names, fontsize=9)
    axes.axvline(100 * asked.target.level, color="grey", linewidth=1, linestyle=":")
    axes.set_xlim(0, 102)
    axes.set_xlabel(f"in SLO at the load + {asked.target.margin:.0%}, %")
    axes.grid(alpha=0.3, axis="x")


def _busy(axes: Any, asked: Question, best: Finalist) -> None:
    """At the load: 100 % is all that there is, or all that the SLO allows."""
    seen, slo = best.seen, asked.target.slo
    rows = {
        "busiest link": seen.link_busy, "pages, at most": seen.pages_peak, "decode steps, of the time": seen.decode_busy,
        "prefill, of the time": seen.prefill_busy, "TPOT p90, of its SLO": seen.tpot_p90_s / slo.tpot_s,
        "TTFT p90, of its SLO": seen.ttft_p90_s / slo.ttft_s,
    }  # fmt: skip
    values = [100 * value for value in rows.values()]
    axes.barh(range(len(rows)), [min(value, 200) for value in values], color=["crimson" if value > 100 else "C7" for value in values])
    for at, value in enumerate(values):
        axes.text(min(value, 200) + 2, at, f"{value:.0f} %", va="center", fontsize=9)
    axes.axvline(100, color="crimson", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set_xlim(0, max(130.0, min(max(values), 200) + 30))
    axes.set_xlabel(f"{best.form.title} at the load, %")
    axes.grid(alpha=0.3, axis="x")
