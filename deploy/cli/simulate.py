"""`halfmoon simulate`: the Conductor on a virtual clock under a trace. Prints a table; writes CSV, JSON and PNG on request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...protocol.errors import HalfmoonError
from ...proxy.conductor.admission import ADMISSIONS
from ...proxy.conductor.placement import Slo
from ...proxy.conductor.policies import POLICIES, policy_type
from ...proxy.conductor.predictors import CostModel
from ...simulator.cluster import simulate as run_cluster
from ...simulator.goodput import GoodputSearch
from ...simulator.outcome import Result
from ...simulator.plots import write_png
from ...simulator.replay import Replay, ReplayOptions, replay
from ...simulator.report import figures, slo_text, summary_table, write_csv, write_json, write_sweep_csv
from ...simulator.scenario import Failure, Judge, Scenario, find_cost_model
from ...simulator.sweep import SweepRow, scenarios, sweep
from ...simulator.trace import Ceiling, Trace, ideal_hits
from ...simulator.trace_formats import FORMATS, Imported, import_trace

console = Console()
progress_console = Console(stderr=True)


def simulate(
    trace: Annotated[Path, typer.Option(help=f"{FORMATS}; plain or .xz.")],
    policy: Annotated[str, typer.Option(help=f"{', '.join(POLICIES)}; several for --sweep, with commas.")] = "kvcache_centric",
    admission: Annotated[str, typer.Option(help=f"{', '.join(ADMISSIONS)}; several for --sweep, with commas.")] = "none",
    prefill: Annotated[int, typer.Option(help="Prefill instances.")] = 8,
    decode: Annotated[int, typer.Option(help="Decode instances.")] = 8,
    coupled: Annotated[bool, typer.Option(help="The baseline: all instances do both, chunked.")] = False,
    chunk: Annotated[int, typer.Option(help="Prefill tokens of a step that also decodes; 0: sized each step by the SLO.")] = 0,
    speed: Annotated[float, typer.Option(help="Arrivals are this many times faster.")] = 1.0,
    slo_ttft: Annotated[float, typer.Option(help="Seconds.")] = 30.0,
    slo_tbt: Annotated[float, typer.Option(help="Milliseconds between two tokens; see --judge.")] = 100.0,
    judge: Annotated[
        str, typer.Option(help="What --slo-tbt bounds: tpot, a request's mean gap, as live; tbt, the mean of its longest tenth.")
    ] = "tpot",
    seed: Annotated[int, typer.Option()] = 0,
    seeds: Annotated[int, typer.Option(help="--sweep: so many seeds, mean and deviation.")] = 1,
    cost_model: Annotated[str, typer.Option(help="A shipped one's name or a file.")] = "a800-70b",
    order: Annotated[str, typer.Option(help="Of prefill queues: short, fcfs, edf, late, fair; default: the policy's own.")] = "",
    threshold: Annotated[float, typer.Option(help="kvcache_centric's balancing threshold.")] = 1.0,
    local_cache: Annotated[bool, typer.Option(help="No prefix comes from another node.")] = False,
    dram: Annotated[int, typer.Option(help="Tokens of a node's cache in DRAM; default: the cost model's.")] = -1,
    ssd: Annotated[int, typer.Option(help="Tokens of a node's cache on SSD, behind the DRAM; default: the cost model's.")] = -1,
    fail: Annotated[list[str] | None, typer.Option(help="TIME:INSTANCE[:DOWN_S], as in 600:n0003:60; may be given again.")] = None,
    cache_on_decode: Annotated[bool, typer.Option(help="Hand-offs stay in the decode node's store too.")] = False,
    sample: Annotated[float, typer.Option(help="Share of the sessions.")] = 1.0,
    dequantise: Annotated[bool, typer.Option(help="Spreads arrivals inside the trace's 3 s ticks.")] = False,
    start: Annotated[float, typer.Option(help="Seconds of trace time; what came in the 20 min before warms the caches.")] = 0.0,
    duration: Annotated[float, typer.Option(help="Seconds of trace time.")] = float("inf"),
    goodput: Annotated[bool, typer.Option(help="Searches the highest speed at --level in SLO.")] = False,
    level: Annotated[float, typer.Option()] = 0.9,
    sweep_: Annotated[bool, typer.Option("--sweep", help="Policies x admissions x splits.")] = False,
    splits: Annotated[str, typer.Option(help="--sweep: prefill counts of the prefill + decode instances, with commas.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for requests.csv, figures.json, run.png; of a sweep sweep.csv and sweep.json.")
    ] = None,
    png: Annotated[bool, typer.Option(help="With --out: the picture too (needs the bench extra).")] = True,
) -> None:
    """Replays a trace against a simulated cluster that runs the real Conductor, schedulers and eviction."""
    try:
        policies, admissions = _names(policy, POLICIES, "policy"), _names(admission, ADMISSIONS, "admission")
        scenario = Scenario(
            cost=_sized(find_cost_model(cost_model), dram, ssd), failures=tuple(Failure.parse(text) for text in fail or ()),
            num_prefill=prefill, num_decode=decode, coupled=coupled, chunk_tokens=chunk,
            policy=policies[0], admission=admissions[0], slo=Slo(slo_ttft, slo_tbt / 1e3), order=_order(order, policies[0]),
            judge=_known(judge, get_args(Judge), "judge"),
            balancing_threshold=threshold, remote_prefix=not local_cache, cache_on_decode=cache_on_decode, seed=seed,
        )  # fmt: skip
        options = ReplayOptions(speed=speed, sample=sample, dequantise=dequantise, start_s=start, duration_s=duration, seed=seed)
        with progress_console.status("reading the trace"):
            imported = import_trace(trace)
        _tell(imported)
        found = imported.trace
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        if goodput:
            _goodput(found, scenario, options, level, out)
        elif sweep_:
            pairs = [(int(number), prefill + decode - int(number)) for number in splits.split(",") if number] or [(prefill, decode)]
            _sweep(found, [_ordered(one, order) for one in scenarios(scenario, policies, admissions, pairs)], options, seeds, out)
        else:
            _one(found, scenario, options, out, png)
    except (HalfmoonError, ValueError) as error:
        message = f"{error.code}: {error.message}" if isinstance(error, HalfmoonError) else str(error)
        progress_console.print(message, style="red", highlight=False)
        raise typer.Exit(1) from error


def _tell(imported: Imported) -> None:
    """What of the file is not replayed, or is not said by it."""
    num, first = imported.left_out
    lines = [f"{num} requests are left out ({first})"] if num else []
    for line in [*lines, *imported.notes]:
        progress_console.print(line, style="yellow", highlight=False)


def _sized(cost: CostModel, dram: int, ssd: int) -> CostModel:
    """Tokens of a node's cache on each tier. -1: the cost model's own."""
    return dataclasses.replace(cost, cache_tokens=dram if dram >= 0 else cost.cache_tokens, ssd_tokens=ssd if ssd >= 0 else cost.ssd_tokens)


def _names(text: str, known: Collection[str], what: str) -> list[str]:
    return [_known(name, known, what) for name in text.split(",")]


def _known(name: str, known: Collection[str], what: str) -> Any:
    if name not in known:
        raise ValueError(f"no {what} {name!r}; choose of {', '.join(known)}")
    return name


def _order(order: str, policy: str) -> Any:
    return _known(order, ("short", "fcfs", "edf", "late", "fair"), "order") if order else policy_type(policy).order


def _ordered(scenario: Scenario, order: str) -> Scenario:
    return scenario.with_(order=_order(order, scenario.policy))


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=progress_console, transient=True)


def _one(trace: Trace, scenario: Scenario, options: ReplayOptions, out: Path | None, png: bool) -> None:
    requests = replay(trace, options)
    ceiling = _ceiling(requests)
    with _progress() as bar:
        task = bar.add_task(scenario.title, total=len(requests.requests))
        every = max(len(requests.requests) // 200, 1)

        def ended(number: int) -> None:
            if number % every == 0:
                bar.update(task, completed=number)

        result = Result(run_cluster(scenario, requests, ended))
    console.print(summary_table(result, scenario, ceiling))
    if out is not None:
        write_csv(result, out / "requests.csv")
        write_json(figures(result, scenario, options, trace, ceiling), out / "figures.json")
        if png:
            write_png(result, scenario, out / "run.png")
        console.print(f"written to {out}", style="dim")


def _ceiling(requests: Replay) -> Ceiling:
    return ideal_hits(requests.requests)


def _goodput(trace: Trace, scenario: Scenario, options: ReplayOptions, level: float, out: Path | None) -> None:
    with progress_console.status("searching") as status:
        tried: list[tuple[float, float]] = []

        def ran(_: Scenario, speed: float, attainment: float) -> None:
            tried.append((speed, attainment))
            status.update(f"run {len(tried)}: speed {speed!r}, {attainment:.1%} in SLO")

        found = GoodputSearch(trace, options, level=level, on_run=ran).search(scenario, options.speed)
    table = Table("speed", "in SLO", title=f"{scenario.title}, {slo_text(scenario.slo)}, {trace.name} (simulated)", title_justify="left")
    for speed, attainment in sorted(tried):
        table.add_row(repr(speed), f"{attainment:.1%}")
    console.print(table)
    if math.isinf(found.fails_at):
        console.print(f"goodput: more than {found.speed!r} x the trace's speed; every speed held {level:.0%} of the requests in SLO")
    else:
        console.print(f"goodput: {found.speed!r} x the trace's speed with {level:.0%} of the requests in SLO; {found.fails_at!r} x fails")
    if out is not None:
        write_json({"goodput_speed": found.speed, "fails_at": found.fails_at, "level": level, "runs": sorted(tried)}, out / "goodput.json")


def _sweep(trace: Trace, chosen: list[Scenario], options: ReplayOptions, num_seeds: int, out: Path | None) -> None:
    rows: list[SweepRow] = []
    with _progress() as bar:
        task = bar.add_task("sweep", total=len(chosen) * num_seeds)

        def ran(scenario: Scenario) -> None:
            bar.update(task, advance=1, description=scenario.title)

        seeds = range(options.seed, options.seed + num_seeds)
        rows.extend(sweep(chosen, lambda seed: replay(trace, dataclasses.replace(options, seed=seed)), seeds, ran))
    table = Table("", "admission", title=f"{trace.name} at {options.speed:g}x, {slo_text(chosen[0].slo)} (simulated)", title_justify="left")
    for name in ("in SLO", "TTFT mean, s", "TTFT p90", "TBT p90, ms", "hit", "rejected", "wasted prefill, s"):
        table.add_column(name, justify="right")
    for row in rows:
        seen, sds = row.figures, row.sds
        rejected = seen["num_rejected_at_arrival"] + seen["num_rejected_at_decode"]
        table.add_row(
            row.scenario.title, row.scenario.admission, f"{seen['attainment']:.1%}",
            f"{seen['ttft_mean_s']:.2f} ± {sds['ttft_mean_s']:.2f}", f"{seen['ttft_p90_s']:.2f}", f"{seen['tbt_p90_s'] * 1e3:.0f}",
            f"{seen['hit_tokens_ratio']:.1%}", f"{rejected:.0f}", f"{seen['wasted_prefill_s']:.0f}",
        )  # fmt: skip
    console.print(table)
    if out is not None:
        listed = [{"title": row.scenario.title, "admission": row.scenario.admission, "mean": row.figures, "sd": row.sds} for row in rows]
        write_json(listed, out / "sweep.json")
        write_sweep_csv(rows, out / "sweep.csv")
        console.print(f"written to {out}", style="dim")
