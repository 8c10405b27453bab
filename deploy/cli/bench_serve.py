"""`halfmoon bench serve`: open-loop load against any OpenAI-compatible endpoint. Prints a table; writes JSON, CSV and PNG on request.

halfmoon bench serve http://127.0.0.1:8000 --rate 1,2,4 --slo 2:0.05 --out run.json
halfmoon bench serve --compare vllm=http://a:8000,http://b:8000 halfmoon=http://c:8000 --trace conversation_trace.jsonl.xz --count 200
halfmoon bench serve --merge a.json b.json --png both.png
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...protocol.errors import ConfigError
from ...simulator.trace import read_trace
from ..load import plots, results, tables
from ..load.arm import ArmOptions, ArmTarget, run_arm
from ..load.arrivals import PROCESSES
from ..load.balancer import BALANCERS
from ..load.environment import shown_command
from ..load.lengths import FORMS
from ..load.plan import Plan, with_cancellations
from ..load.summary import Slo
from ..load.synthetic_plan import SyntheticOptions, synthetic_plan
from ..load.trace_plan import TraceOptions, trace_plan
from ..load.window import Progress as WindowProgress

Flag = typer.Option
console = Console()
error_console = Console(stderr=True)


def serve(
    what: Annotated[list[str] | None, typer.Argument(help="URL[,URL]; --compare: NAME=URL[,URL] …; --merge: JSON files.")] = None,
    compare: Annotated[bool, Flag("--compare", help="Several arms in turn, on exactly the same requests.")] = False,
    merge: Annotated[bool, Flag("--merge", help="The joint table and picture of earlier runs' JSON files.")] = False,
    rate: Annotated[str, Flag(help="Requests a second; several, with commas, are a window each.")] = "1",
    num_requests: Annotated[int, Flag("--requests", help="In a window of synthetic load.", min=1)] = 100,
    arrival: Annotated[str, Flag(help=f"{', '.join(PROCESSES)}.")] = "poisson",
    burstiness: Annotated[float, Flag(help="Of gamma arrivals: 1 is Poisson, smaller is burstier.")] = 1.0,
    input_len: Annotated[str, Flag(help=f"Prompt tokens: {FORMS}.")] = "512",
    output_len: Annotated[str, Flag(help="Answer tokens, likewise.")] = "128",
    shared_share: Annotated[float, Flag(help="Of a prompt, the share in common with its group.")] = 0.0,
    groups: Annotated[int, Flag(help="That share a prefix each.", min=1)] = 1,
    turns: Annotated[int, Flag(help="Of a conversation; each brings the history along.", min=1)] = 1,
    turn_gap: Annotated[float, Flag(help="Mean time between two turns, in mean gaps between requests.")] = 10.0,
    trace: Annotated[Path | None, Flag(help="Mooncake's format, .jsonl or .jsonl.xz, in place of synthetic load.")] = None,
    speed: Annotated[str, Flag(help="Of the trace; several with commas.")] = "1",
    start: Annotated[int, Flag(help="First request of the trace's window.", min=0)] = 0,
    start_s: Annotated[float, Flag(help="The window begins at this trace time.")] = 0.0,
    count: Annotated[int | None, Flag(help="Requests of the trace's window.", min=1)] = None,
    seconds: Annotated[float | None, Flag(help="Trace time of the window.")] = None,
    spread_s: Annotated[float | None, Flag(help="Equal stamps are spread over this; default: the clock's tick, if it has one.")] = None,
    max_input: Annotated[int, Flag(help="Longer prompts of a trace are left out, synthetic ones cut.")] = 131072,
    max_output: Annotated[int, Flag(help="Longer answers are cut.")] = 131072,
    warm_up: Annotated[int, Flag(help="Requests before the measurement, thrown away.", min=0)] = 10,
    measure_from: Annotated[float, Flag(help="Requests that arrive before these seconds of a window do not count.")] = 0.0,
    measure_to: Annotated[float | None, Flag(help="Nor do those that arrive after.")] = None,
    slo: Annotated[list[str] | None, Flag(help="TTFT:TPOT in seconds, as in 2:0.05; may be given again.")] = None,
    goodput: Annotated[bool, Flag("--goodput", help="Searches the highest rate that holds the first SLO at --level.")] = False,
    level: Annotated[float, Flag(help="Share of the requests that must meet the SLO.")] = 0.9,
    tail: Annotated[bool, Flag("--tail", help="Goodput by the longest tenth of gaps in place of the mean TPOT.")] = False,
    tolerance: Annotated[float, Flag(help="Relative width of goodput's last bracket.")] = 0.05,
    max_probes: Annotated[int, Flag(help="Runs of a search, at most.", min=1)] = 12,
    budget_s: Annotated[float | None, Flag(help="Of an arm: a window that sends later than that is left out.")] = None,
    cancel_share: Annotated[float, Flag(help="Share of the requests whose client leaves at half of the answer.")] = 0.0,
    timeout: Annotated[float, Flag(help="Seconds, of a request.")] = 600.0,
    api: Annotated[str, Flag(help="completions or chat.")] = "completions",
    prompts: Annotated[str | None, Flag(help="tokens or text; default: tokens, and text for chat.")] = None,
    vocab: Annotated[int, Flag(help="Token ids are drawn from 100 up to this.", min=101)] = 2000,
    model: Annotated[str, Flag(help="Default: the first that the endpoint lists.")] = "",
    balance: Annotated[str, Flag(help=f"Between an arm's endpoints: {', '.join(BALANCERS)}.")] = "prefix_aware",
    ignore_eos: Annotated[bool, Flag(help="Asks for answers of the full length; not every server knows it.")] = True,
    extra_body: Annotated[str, Flag(help="JSON, added to every request.")] = "{}",
    api_key: Annotated[str, Flag(envvar="OPENAI_API_KEY", help="Sent as a bearer token; never written down.")] = "",
    seed: Annotated[int | None, Flag(help="Of everything drawn. Default: another each time, or a server would know the prompts.")] = None,
    out: Annotated[Path | None, Flag(help="JSON with every request.")] = None,
    csv: Annotated[Path | None, Flag(help="A line a request.")] = None,
    png: Annotated[Path | None, Flag(help="Attainment over the rate, TTFT and TPOT distributions (needs matplotlib).")] = None,
) -> None:  # fmt: skip
    """Open-loop load against OpenAI-compatible endpoints: TTFT, TPOT, gaps, SLO attainment, goodput."""
    given = what or ([] if compare or merge else ["http://127.0.0.1:8000"])
    if merge:
        _show(results.merge([Path(name) for name in _some(given, "JSON files")]), None, csv, png, out)
        return
    seed = secrets.randbelow(1 << 20) if seed is None else seed
    targets = [ArmTarget.parse(text) for text in _some(given, "NAME=URL")]
    if len(targets) > 1 and not compare:
        raise ConfigError(f"{len(targets)} targets; with --compare they are arms in turn, with commas between them one arm")
    options = ArmOptions(
        factors=_numbers(rate if trace is None else speed), slos=tuple(map(Slo.parse, slo or ["2:0.05"])), balance=balance,
        vocab_size=vocab, seed=seed, model=model, api=_one_of(api, "completions", "chat"), timeout_s=timeout, ignore_eos=ignore_eos,
        prompts=_one_of(prompts or ("text" if api == "chat" else "tokens"), "tokens", "text"), extra_body=_body(extra_body),
        measure_from_s=measure_from, measure_to_s=float("inf") if measure_to is None else measure_to, goodput=goodput, by_tail=tail,
        level=level, tolerance=tolerance, max_probes=max_probes, budget_s=float("inf") if budget_s is None else budget_s,
    )  # fmt: skip
    if trace is None:
        synthetic = SyntheticOptions(
            num_requests=num_requests, input_len=input_len, output_len=output_len, process=arrival, burstiness=burstiness,
            shared_share=shared_share, num_groups=groups, turns=turns, turn_gap=turn_gap, max_input=max_input, max_output=max_output,
            num_warm_up=warm_up, seed=seed,
        )  # fmt: skip
        plan = synthetic_plan(synthetic)
    else:
        window = TraceOptions(
            start=start, start_s=start_s, count=count, seconds=seconds, max_input=max_input, max_output=max_output, spread_s=spread_s,
            num_warm_up=warm_up, seed=seed,
        )  # fmt: skip
        plan = trace_plan(read_trace(trace), window)
    if not 0.0 <= cancel_share <= 1.0:
        raise ConfigError(f"--cancel-share is {cancel_share:g}; it must be from 0 to 1")
    plan = with_cancellations(plan, cancel_share, seed)
    error_console.print(f"{len(plan.requests)} requests a window, seed {seed}", style="dim", highlight=False)
    _show(asyncio.run(_run(targets, plan, options, api_key, out)), out, csv, png)


async def _run(targets: Sequence[ArmTarget], plan: Plan, options: ArmOptions, api_key: str, out: Path | None) -> results.Arms:
    """out: written after every arm, so that the failure of a later one loses nothing."""
    command = shown_command(["halfmoon", "bench", "serve", *_arguments()])
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", style="dim"), TimeElapsedColumn(),
    )  # fmt: skip
    arms: results.Arms = []
    # drawn only four times a second, so that drawing does not take CPU time from the load
    with Progress(*columns, console=error_console, transient=True, refresh_per_second=4) as bar:
        tasks: dict[str, Any] = {}

        def notify(label: str, seen: WindowProgress) -> None:
            for other, task in tasks.items():
                if other != label:
                    bar.update(task, visible=False)
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=seen.num_requests, state="")
            bad = sum(count for outcome, count in seen.outcomes.items() if outcome not in ("ok", "cancelled"))
            state = f"{seen.num_running} running" + (f", {bad} failed" if bad else "")
            bar.update(tasks[label], completed=seen.num_ended, state=state, visible=True)

        for target in targets:
            arms.append(await run_arm(target, plan, options, notify, api_key=api_key, command=command))
            if out is not None:
                results.write_json(arms, out)
    return arms


def _show(arms: results.Arms, out: Path | None, csv: Path | None, png: Path | None, merged: Path | None = None) -> None:
    for path in (path for path in (out, merged) if path is not None):
        results.write_json(arms, path)
    if csv is not None:
        results.write_csv(arms, csv)
    if png is not None:
        plots.write_png(arms, png)
    if len(arms) == 1:
        for grid in tables.detail_tables(arms[0]):
            console.print(tables.to_rich(grid), "")
    for grid in tables.joint_tables(arms):
        console.print(tables.to_rich(grid), "")
    for line in tables.goodput_lines(arms):
        console.print(line, style="bold", highlight=False)
    if differing := results.different_loads(arms):
        console.print(f"the arms' loads differ in {', '.join(differing)}: their figures do not compare", style="bold red", highlight=False)
    for line in tables.warnings(arms):
        console.print(line, style="bold red" if "BOTTLENECK" in line else "yellow", highlight=False)
    for path in (path for path in (out, merged, csv, png) if path is not None):
        error_console.print(f"written to {path}", style="dim", highlight=False)


def _arguments() -> list[str]:
    arguments = sys.argv[1:]
    return arguments[2:] if arguments[:2] == ["bench", "serve"] else arguments


def _some(given: list[str], what: str) -> list[str]:
    if not given:
        raise ConfigError(f"nothing is named; give {what}")
    return given


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{text!r} has what is no number; write numbers with commas between them") from error


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body {text!r} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"--extra-body {text!r} is no JSON object, as in '{{\"min_tokens\": 8}}'")
    return cast(dict[str, Any], body)


def _one_of(value: str, *known: str) -> Any:
    if value not in known:
        raise ConfigError(f"{value!r} is not one of {', '.join(known)}")
    return value
