"""Pictures of a run: TTFT and TBT distributions, load of both pools over time. matplotlib is the [bench] extra, imported here only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.errors import ConfigError
from .outcome import Result
from .scenario import Scenario


def write_png(result: Result, scenario: Scenario, path: Path) -> None:
    """Raises ConfigError where matplotlib is not installed."""
    pyplot = load_pyplot()
    figure, (ttft, tbt, load) = pyplot.subplots(1, 3, figsize=(15, 4))
    done = [row for row in result.rows if row.outcome == "done"]
    _cdf(ttft, np.array([row.ttft_s for row in done]), scenario.slo.ttft_s, "TTFT [s]")
    ttft.set_xscale("log")
    _cdf(tbt, np.array([row.tbt_s * 1e3 for row in done]), scenario.slo.tpot_s * 1e3, "TBT, mean of the longest tenth [ms]")
    times, prefilling, decoding, rejected = load_over_time(result)
    load.plot(times, prefilling, label="waiting for prefill or in it")
    load.plot(times, decoding, label="decoding")
    load.plot(times, rejected, label="rejected in 10 s", color="crimson")
    load.set_xlabel("time [s]")
    load.set_ylabel("requests")
    load.legend()
    figure.suptitle(f"{scenario.title}, admission {scenario.admission}, simulated")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def load_over_time(result: Result, step_s: float = 10.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Moments; requests in prefill (queue included), requests decoding, requests rejected since the last moment."""
    end_s = max((row.arrival_s + max(row.e2e_s, 0.0) for row in result.rows), default=0.0)
    times = np.arange(0.0, end_s + step_s, step_s)

    def under_way(starts: list[float], ends: list[float]) -> np.ndarray:
        return np.searchsorted(np.sort(starts), times, "right") - np.searchsorted(np.sort(ends), times, "right")

    done = [row for row in result.rows if row.outcome == "done"]
    prefilling = under_way([row.arrival_s for row in done], [row.arrival_s + row.ttft_s for row in done])
    decoding = under_way([row.arrival_s + row.ttft_s for row in done], [row.arrival_s + row.e2e_s for row in done])
    rejected, _ = np.histogram(
        [row.arrival_s for row in result.rows if row.outcome.startswith("rejected")], bins=[*times, times[-1] + step_s]
    )
    return times, prefilling, decoding, rejected


def _cdf(axes: Any, values: np.ndarray, limit: float, name: str) -> None:
    values = np.sort(values)
    axes.plot(values, np.arange(1, len(values) + 1) / max(len(values), 1))
    if np.isfinite(limit):
        axes.axvline(limit, color="crimson", linestyle="--")
    axes.set_xlabel(name)
    axes.set_ylabel("share of the served")
    axes.grid(alpha=0.3)


def load_pyplot() -> Any:
    """Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ConfigError("a PNG needs matplotlib: pip install 'halfmoon[bench]', or leave the picture out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
