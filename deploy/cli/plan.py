"""`halfmoon plan`: how many GPUs a load needs, and as what. Prints a table; writes JSON and PNG on request. Simulated, without a GPU.

halfmoon plan --trace conversation_trace.jsonl.xz --slo 2s:30ms --gpus 8 --model qwen3-32b --tp 2 --gpu h100 --png plan.png
halfmoon plan --trace synthetic --rate 4 --input-len lognormal:800:1 --output-len 200 --slo 1s:25ms --gpus 4 --model 8b
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...protocol.errors import ConfigError
from ...proxy.conductor.placement import Slo
from ...proxy.conductor.predictors import CostModel
from ...simulator.plots import load_pyplot
from ...simulator.report import write_json
from ...simulator.scenario import Scenario, find_cost_model
from ...simulator.trace import Trace
from ...simulator.trace_formats import FORMATS, import_trace
from ..load.arrivals import PROCESSES
from ..load.lengths import FORMS
from ..planner.cost_models import cost_model_of
from ..planner.gpus import GPUS
from ..planner.model_shape import find_shape, shipped_shapes
from ..planner.picture import write_png
from ..planner.points import fit_points, read_points
from ..planner.runner import Runner
from ..planner.sizing import Plan, Target, size
from ..planner.synthetic import synthetic_trace
from ..planner.verdict import Question, plain, show
from ..planner.window import Window, choose_window

SYNTHETIC = "synthetic"
JITTER, REPORT_S = 0.03, 0.05  # of steps; age of what the proxy knows of a worker
console = Console()
error_console = Console(stderr=True)


def plan(
    trace: Annotated[str, typer.Option(help=f"{FORMATS}; plain or .xz. Or: {SYNTHETIC}.")],
    slo: Annotated[str, typer.Option(help="TTFT:TPOT, as in 2s:30ms or 2:0.03 (seconds).")],
    model: Annotated[str, typer.Option(help=f"{', '.join(shipped_shapes())}, or a folder with config.json.")],
    gpus: Annotated[int, typer.Option(help="That there are, at most.", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}.")] = "h100",
    tp: Annotated[int, typer.Option(help="GPUs of an instance.", min=1)] = 1,
    rate: Annotated[float, typer.Option(help="Requests a second that the trace is scaled to; default: its own.", min=0.0)] = 0.0,
    level: Annotated[float, typer.Option(help="Share of the requests that must be in SLO.", min=0.01, max=1.0)] = 0.9,
    margin: Annotated[float, typer.Option(help="Load that must be held beyond the trace's; 0.2: a fifth more.", min=0.0)] = 0.2,
    cost_model: Annotated[str, typer.Option(help="A shipped one's name or a file, in place of the model's on the GPU.")] = "",
    points: Annotated[Path | None, typer.Option(help="CSV of measured steps that the cost model is fitted to.")] = None,
    input_len: Annotated[str, typer.Option(help=f"{SYNTHETIC}: prompt tokens, {FORMS}.")] = "lognormal:800:1",
    output_len: Annotated[str, typer.Option(help=f"{SYNTHETIC}: answer tokens, likewise.")] = "200",
    arrival: Annotated[str, typer.Option(help=f"{SYNTHETIC}: {', '.join(PROCESSES)}.")] = "poisson",
    burstiness: Annotated[float, typer.Option(help=f"{SYNTHETIC}: of gamma arrivals: 1 is Poisson, smaller is burstier.")] = 1.0,
    requests: Annotated[int, typer.Option(help="That are simulated; default: enough for the answers' length.", min=0)] = 0,
    seconds: Annotated[float, typer.Option(help="After these no run is begun any more.", min=1.0)] = 40.0,
    processes: Annotated[int, typer.Option(help="0: one a core, 8 at most.", min=0)] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON with everything.")] = None,
    png: Annotated[Path | None, typer.Option(help="A picture (needs matplotlib: the bench extra).")] = None,
) -> None:
    """How many GPUs, and as what: coupled, prefill and decode, or roles that follow the load."""
    target = Target(parse_slo(slo), level, margin)
    if png is not None:
        load_pyplot()  # what is not installed is told before the runs
    if gpus < tp:
        raise ConfigError(f"--gpus {gpus} is less than one instance of --tp {tp}")
    cost, longest, notes = _cost(model, gpu, tp, cost_model, points)
    with error_console.status("reading the trace") as status:
        found, told = _trace(trace, rate, input_len, output_len, arrival, burstiness, seed)
        window = choose_window(
            found, cost, target.slo, longest=longest, num_instances=gpus // tp, rate=rate, num_requests=requests, seed=seed
        )
        notes += [*told, *window.notes]
        base = Scenario(cost=cost, slo=target.slo, step_jitter=JITTER, report_s=REPORT_S, seed=seed)
        runner = Runner(
            window.trace, window.options, level, num_processes=processes, budget_s=seconds,
            on_run=lambda number: status.update(f"{number} runs and searches of {window.num_requests} requests"),
        )  # fmt: skip
        try:
            answer = size(window, base, target, gpus // tp, runner)
        finally:
            runner.close()
    asked = Question(model, gpu, tp, gpus, found.name, target, cost)
    served = answer.holds and tp == 1
    command = answer.finalists[0].form.command(f"--slo-ttft {target.slo.ttft_s:g} --slo-tpot {target.slo.tpot_s:g}") if served else ""
    show(asked, window, answer, notes, command, console)
    _write(asked, window, answer, notes, command, out, png)


def parse_slo(text: str) -> Slo:
    """ "2s:30ms", "2:0.03": seconds where no unit stands. Raises ConfigError."""
    try:
        ttft_s, tpot_s = map(_seconds, text.split(":"))
    except ValueError as error:
        raise ConfigError(f"{text!r} is no SLO; write the time to the first token and that of a token, as in 2s:30ms") from error
    if not (0 < ttft_s < float("inf") and 0 < tpot_s < float("inf")):
        raise ConfigError(f"the SLO {text!r} can't be met; both of its times must be above 0")
    return Slo(ttft_s, tpot_s)


def _seconds(text: str) -> float:
    text = text.strip()
    return float(text.removesuffix("ms")) / 1e3 if text.endswith("ms") else float(text.removesuffix("s"))


def _cost(model: str, gpu: str, tp: int, cost_model: str, points: Path | None) -> tuple[CostModel, int, list[str]]:
    """The cost model, the longest request that an instance serves, and what has to be told."""
    shape = find_shape(model)
    cost = find_cost_model(cost_model) if cost_model else cost_model_of(shape, gpu, tp)
    notes: list[str] = []
    if points is not None:
        fit = fit_points(read_points(points), cost, f"measured: fitted to {points}")
        cost = fit.cost
        notes.append(
            f"the points of {points} are fitted with errors of {fit.median_error:.1%} (median) and {fit.largest_error:.1%} (largest)"
        )
    return cost, min(shape.max_len, cost.kv_capacity_tokens), notes


def _trace(name: str, rate: float, input_len: str, output_len: str, arrival: str, burstiness: float, seed: int) -> tuple[Trace, list[str]]:
    if name == SYNTHETIC:
        return synthetic_trace(rate, input_len, output_len, arrival, burstiness, seed), []
    found = import_trace(Path(name))
    left_out = [f"{found.left_out.num} requests of the file are left out; the first: {found.left_out.first}"] if found.left_out.num else []
    return found.trace, [*left_out, *found.notes]


def _write(asked: Question, window: Window, answer: Plan, notes: list[str], command: str, out: Path | None, png: Path | None) -> None:
    if out is not None:
        write_json(plain(asked, window, answer, notes, command), out)
    if png is not None:
        write_png(asked, window, answer, png)
    for path in (path for path in (out, png) if path is not None):
        error_console.print(f"written to {path}", style="dim", highlight=False)
