"""A run's figures as tables, arms side by side: for a terminal (rich), or in Markdown if rich is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .results import Arms

if TYPE_CHECKING:
    from rich.table import Table

DISTRIBUTIONS = (
    ("TTFT, s", "ttft_s", 1.0), ("TPOT, ms", "tpot_s", 1e3), ("gaps (ITL), ms", "itl_s", 1e3),
    ("longest tenth of gaps, ms", "tail_itl_s", 1e3), ("end to end, s", "e2e_s", 1.0),
)  # fmt: skip
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


class Grid(NamedTuple):
    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def joint_tables(arms: Arms) -> list[Grid]:
    """A line for each window, in two tables of at most 80 columns. In SLO: percent by mean TPOT / by the longest tenth of gaps."""
    slos: list[tuple[float, float]] = []
    for arm in arms:
        for window in arm["windows"]:
            slos += [pair for pair in map(_pair, window["summary"]["slos"]) if pair not in slos]
    heads = ("arm", factor_name(arms))
    latency = (*heads, "TTFT p50/p90/p99 s", "TPOT p50/p90/p99 ms", "tail p50/p90 ms")
    rates = (*heads, "requests", "not ok", "req/s", "tok/s", "hit %", *(f"{ttft_s:g}s/{tpot_s * 1e3:g}ms" for ttft_s, tpot_s in slos))
    windows = [(arm["name"], window) for arm in arms for window in arm["windows"]]
    ceilings = {arm["plan"].get("ceiling_tokens_ratio") for arm in arms} - {None}
    repeats = f"; {max(ceilings):.0%} of the prompts' tokens repeat in a window" if ceilings else ""
    return [
        Grid("tail: mean of a request's longest tenth of gaps", latency, [_latency_row(*window) for window in windows]),
        Grid(f"in SLO: % of the requests by mean TPOT / by tail{repeats}", rates, [_rates_row(*window, slos) for window in windows]),
    ]


def factor_name(arms: Arms) -> str:
    return " or ".join(sorted({window["kind"] for arm in arms for window in arm["windows"]})) or "rate"


def _latency_row(name: str, window: dict[str, Any]) -> tuple[str, ...]:
    summary = window["summary"]
    ttft = _slashed(summary["ttft_s"], ("p50", "p90", "p99"), 1.0, 2)
    tpot = _slashed(summary["tpot_s"], ("p50", "p90", "p99"), 1e3, 1)
    return name, _factor(window), ttft, tpot, _slashed(summary["tail_itl_s"], ("p50", "p90"), 1e3, 0)


def _rates_row(name: str, window: dict[str, Any], slos: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    summary = window["summary"]
    judged = {_pair(slo): slo for slo in summary["slos"]}
    bad = ", ".join(f"{count} {outcome}" for outcome, count in summary["outcomes"].items() if count and outcome != "ok")
    shares = ([judged[slo][name] * 100 for name in ("attainment", "attainment_tail")] if slo in judged else [] for slo in slos)
    cells = (" / ".join(f"{share:.0f}" for share in found) or "-" for found in shares)
    hit = summary["prefix_hit_ratio"]
    return (
        name, _factor(window), str(summary["num_requests"]), bad or "0", f"{summary['requests_per_s']:.2f}",
        f"{summary['output_tokens_per_s']:.0f}", "-" if hit is None else f"{hit * 100:.0f}", *cells,
    )  # fmt: skip


def _factor(window: dict[str, Any]) -> str:
    return f"{window['factor']:.3g}" + (" (client-limited)" if window["lag"]["limited_by"] else "")


def detail_tables(arm: dict[str, Any]) -> list[Grid]:
    """Every distribution of each window, and Halfmoon's phases if the server sent them."""
    grids: list[Grid] = []
    for window in arm["windows"]:
        summary = window["summary"]
        rows = [(name, *_cells(summary[key], scale)) for name, key, scale in DISTRIBUTIONS]
        grids.append(Grid(f"{arm['name']}, {window['kind']} {window['factor']:g}", ("", *COLUMNS), rows))
        if summary["phases"]:
            phases = [(name, *_cells(spread, 1e3)) for name, spread in summary["phases"].items()]
            grids.append(Grid("the server's phases, ms", ("", *COLUMNS), phases))
    return grids


def goodput_lines(arms: Arms) -> list[str]:
    lines: list[str] = []
    for arm in arms:
        found = arm["goodput"]
        if found is None:
            continue
        slo, holds, fails = found["slo"], found["holds"], found["fails"]
        pace = "longest tenth of gaps" if found["by_tail"] else "mean TPOT"
        head = f"{arm['name']}: goodput at {slo['ttft_s']:g} s, {slo['tpot_s'] * 1e3:g} ms ({pace}), {found['level']:.0%} of the requests: "
        held = "no rate held" if holds is None else f"{found['kind']} {holds['factor']:.3g} ({holds['attainment']:.1%} in SLO)"
        failed = "none failed" if fails is None else f"{fails['factor']:.3g} fails ({fails['attainment']:.1%})"
        lines.append(f"{head}{held}; {failed}; {len(found['probes'])} runs, {found['ended']}")
    return lines


def warnings(arms: Arms) -> list[str]:
    """Warnings for readers of the figures."""
    lines: list[str] = []
    for arm in arms:
        for window in arm["windows"]:
            where = f"{arm['name']}, {window['kind']} {window['factor']:g}"
            if window["lag"]["limited_by"]:
                lines.append(
                    f"{where}: THE CLIENT WAS THE BOTTLENECK, these are not the server's figures: {'; '.join(window['lag']['limited_by'])}"
                )
            for text, count in window["summary"]["errors"].items():
                lines.append(f"{where}: {count} x {text}")
        if arm["left_out"]:
            lines.append(f"{arm['name']}: no time was left for {', '.join(f'{factor:g}' for factor in arm['left_out'])}")
    return lines


def to_markdown(grid: Grid) -> str:
    lines = ["| " + " | ".join(grid.headings) + " |", "|" + "---|" * len(grid.headings)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in grid.rows)]) + "\n"


def to_rich(grid: Grid) -> Table:
    from rich.table import Table

    table = Table(title=grid.title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    for number, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in grid.rows:
        table.add_row(*row)
    return table


def _pair(slo: dict[str, Any]) -> tuple[float, float]:
    return slo["ttft_s"], slo["tpot_s"]


def _slashed(spread: dict[str, float] | None, names: Sequence[str], scale: float, digits: int) -> str:
    return "-" if spread is None else " / ".join(f"{spread[name] * scale:.{digits}f}" for name in names)


def _cells(spread: dict[str, float] | None, scale: float) -> tuple[str, ...]:
    return tuple("-" if spread is None else f"{spread[name] * scale:.3f}" for name in COLUMNS)
