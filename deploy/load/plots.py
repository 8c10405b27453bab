"""A picture of a run: attainment over the rate, TTFT and TPOT distributions, arms side by side. matplotlib is imported here only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...protocol.errors import ConfigError
from .results import Arms
from .tables import factor_name

WIDE = 10.0  # largest / smallest value; from this ratio on an axis is logarithmic


def write_png(arms: Arms, path: Path) -> None:
    """Raises ConfigError if matplotlib is not installed."""
    pyplot = _pyplot()
    figure, (reached, ttft, tpot) = pyplot.subplots(1, 3, figsize=(17, 4.6))
    slos = [tuple(map(float, (slo["ttft_s"], slo["tpot_s"]))) for slo in _first_slos(arms)]
    colours = {arm["name"]: f"C{number % 10}" for number, arm in enumerate(arms)}
    for number, slo in enumerate(slos[:3]):
        for arm in arms:
            points = sorted((window["factor"], attained) for window in arm["windows"] if (attained := _attained(window, slo)) is not None)
            label = f"{arm['name']}, {slo[0]:g} s / {slo[1] * 1e3:g} ms"
            style = ("-o", "--s", ":^")[number]
            reached.plot([x for x, _ in points], [100 * y for _, y in points], style, color=colours[arm["name"]], label=label)
    reached.set_xlabel(factor_name(arms))
    reached.set_ylabel("in SLO, %")
    reached.set_ylim(-2, 102)
    reached.grid(alpha=0.3)
    reached.legend(fontsize=7)
    for axes, name, scale, title in ((ttft, "ttft_s", 1.0, "TTFT [s]"), (tpot, "tpot_s", 1e3, "TPOT, mean of a request [ms]")):
        for arm in arms:
            for window in arm["windows"]:
                _cdf(axes, window, name, scale, f"{arm['name']}, {window['factor']:.3g}", _shade(arm, window, colours[arm["name"]]))
        low, high = axes.get_xlim()
        if 0 < low and high > WIDE * low:
            axes.set_xscale("log")
        axes.set_xlabel(title)
        axes.set_ylabel("share of the answered")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _first_slos(arms: Arms) -> list[dict[str, Any]]:
    found: list[list[dict[str, Any]]] = [window["summary"]["slos"] for arm in arms for window in arm["windows"]]
    return found[0] if found else []


def _attained(window: dict[str, Any], slo: tuple[float, ...]) -> float | None:
    return next((found["attainment"] for found in window["summary"]["slos"] if (found["ttft_s"], found["tpot_s"]) == slo), None)


def _shade(arm: dict[str, Any], window: dict[str, Any], colour: str) -> dict[str, Any]:
    """Higher rates are darker."""
    factors = sorted({one["factor"] for one in arm["windows"]})
    return {"color": colour, "alpha": (factors.index(window["factor"]) + 1) / len(factors)}


def _cdf(axes: Any, window: dict[str, Any], name: str, scale: float, label: str, style: dict[str, Any]) -> None:
    found = [one[name] * scale for one in window["requests"] if one["measured"] and one["outcome"] == "ok" and one[name] is not None]
    if found:
        axes.plot(np.sort(found), np.arange(1, len(found) + 1) / len(found), label=label, **style)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ConfigError("a PNG needs matplotlib: pip install 'halfmoon[bench]', or leave --png out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
