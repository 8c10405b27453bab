"""A plan in words and rows: what to take, what it carries, what breaks first. Everything in it is simulated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...proxy.conductor.predictors.cost_model import CostModel
from .runner import Carried
from .sizing import Finalist, Plan, Target, Tried
from .window import Window

CLOSE = 0.03  # share in SLO between an idle instance and the level, within which hardly any load fits


class Question(NamedTuple):
    """What was asked."""

    model: str
    gpu: str
    tp: int
    num_gpus: int
    trace: str
    target: Target
    cost: CostModel


def slo_of(target: Target) -> str:
    return f"{target.slo.ttft_s:g} s / {target.slo.tpot_s * 1e3:g} ms for {target.level:.0%}"


def headline(asked: Question, window: Window, plan: Plan) -> str:
    """One line."""
    if not plan.finalists:
        return f"No number of GPUs holds {slo_of(asked.target)}: on an idle instance {plan.alone.attainment:.1%} of the requests are in SLO"
    best = plan.finalists[0]
    gpus, what = best.form.num_instances * asked.tp, describe(best, asked.tp)
    carries = f"carries {carried_text(best.carried, window)} requests a second"
    if plan.holds:
        return f"{what}, {gpus} {asked.gpu.upper()}: {carries}, {_times(best, window)} the load"
    most = max(plan.finalists, key=lambda one: one.carried.speed)
    return f"{gpus} {asked.gpu.upper()} do not hold the load with its margin; the best form, {describe(most, asked.tp)}, {carries}"


def describe(one: Finalist | Tried, tp: int) -> str:
    form = one.form
    of = f" of TP{tp}" if tp > 1 else ""
    if form.kind == "split":
        return f"{form.num_prefill} prefill + {form.num_decode} decode{of}"
    return f"{form.num_instances} {form.kind}{of}"


def _times(one: Finalist, window: Window) -> str:
    return f"{one.carried.speed / window.speed:.2f} times"


def carried_text(carried: Carried, window: Window) -> str:
    if not carried.speed:
        return f"less than {carried.fails_at * window.rate:.3g}"
    return f"{'more than ' if math.isinf(carried.fails_at) else ''}{carried.speed * window.rate:.3g}"


def lines(asked: Question, window: Window, plan: Plan) -> Iterator[str]:
    """What stands below the table."""
    alone, target = plan.alone, asked.target
    yield (
        f"alone on an idle instance: {alone.attainment:.1%} in SLO, TTFT p50 / p90 {alone.ttft_p50_s:.2f} / {alone.ttft_p90_s:.2f} s, "
        f"TPOT p90 {alone.tpot_p90_s * 1e3:.1f} ms"
    )
    if alone.attainment < target.level:
        yield (
            f"even so {alone.late_share:.1%} have their first token after {target.slo.ttft_s:g} s, and {alone.slow_share:.1%} a token less "
            f"often than every {target.slo.tpot_s * 1e3:g} ms: give a longer SLO, a lower --level or another --tp"
        )
        return
    if plan.num_skipped:
        needed = window.work * (1 + target.margin) * window.speed
        yield f"fewer than {(plan.num_skipped + 1) * asked.tp} GPUs were not tried: the work alone needs {needed:.1f} instances"
    best = plan.finalists[0]
    if best.carried.breaks:
        yield f"{best.form.title} breaks first at {best.carried.fails_at * window.rate:.3g} requests a second by {best.carried.breaks}"
    if not plan.holds and alone.attainment < target.level + CLOSE:
        yield f"{target.level:.0%} is nearly all that an idle instance holds: a longer SLO or a lower --level carries far more"
    elif not plan.holds and best.carried.speed:
        needed = best.form.num_instances * window.speed * (1 + target.margin) / best.carried.speed
        yield f"if rate grows with instances, the load with its margin wants about {math.ceil(needed) * asked.tp} GPUs; --gpus tries it"
    if plan.out_of_time:
        yield "time was up before everything was run (--seconds): brackets are wider, or forms are missing"


def cautions(asked: Question) -> Iterator[str]:
    yield f"cost model {asked.cost.name or 'of your own'}: {asked.cost.source or 'of unknown source'}"
    if asked.tp > 1:
        yield "tensor parallel workers are served, and have not been run on GPUs yet: what they take is derived"


def table(asked: Question, window: Window, plan: Plan) -> Table:
    """Narrow enough for 80 columns."""
    target = asked.target
    load = f"{window.needed_rate * (1 + target.margin):.3g} requests a second"
    found = Table(title=f"At {load}, the load and {target.margin:.0%} (simulated)", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("form", "GPUs", "in SLO", "carries", "TTFT p90", "TPOT p90", "prefill", "decode", "pages"):
        found.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
    finals = {one.form: one for one in plan.finalists}
    for one in sorted(plan.tried, key=lambda one: (one.form.num_instances, -one.seen.attainment)):
        carried = carried_text(finals[one.form].carried, window) if one.form in finals else "-"
        seen, best = one.seen, plan.holds and one.form == plan.finalists[0].form
        found.add_row(
            one.form.title, str(one.form.num_instances * asked.tp), f"{seen.attainment:.1%}",
            carried.replace("less than", "<").replace("more than", ">"), f"{seen.ttft_p90_s:.3g} s", f"{seen.tpot_p90_s * 1e3:.1f} ms",
            f"{seen.prefill_busy:.0%}", f"{seen.decode_busy:.0%}", f"{seen.pages_peak:.0%}", style="bold" if best else "",
        )  # fmt: skip
    return found


def show(asked: Question, window: Window, plan: Plan, notes: list[str], command: str, console: Console) -> None:
    """Long lines are the terminal's to wrap."""

    def tell(line: str, style: str = "") -> None:
        console.print(Text(line, style=style), soft_wrap=True)

    tell(f"{asked.model} on {asked.gpu.upper()}, TP{asked.tp}; {asked.trace}, {window.needed_rate:.3g} requests a second; "
         f"SLO {slo_of(asked.target)}; at most {asked.num_gpus} GPUs")  # fmt: skip
    for note in notes:
        tell(note, "dim")
    tell("")
    if plan.tried:
        console.print(table(asked, window, plan), "")
    tell(f"{headline(asked, window, plan)}.", "bold green" if plan.holds else "bold yellow")
    for line in lines(asked, window, plan):
        tell(line)
    if command:
        tell(command, "cyan")
    for line in cautions(asked):
        tell(line, "dim")


def plain(asked: Question, window: Window, plan: Plan, notes: list[str], command: str) -> dict[str, Any]:
    """For JSON."""

    target = asked.target
    return {
        "kind": "simulated", "headline": headline(asked, window, plan), "holds": plan.holds,
        "asked": {
            "model": asked.model, "gpu": asked.gpu, "tp": asked.tp, "num_gpus": asked.num_gpus, "trace": asked.trace,
            "ttft_slo_s": target.slo.ttft_s, "tpot_slo_s": target.slo.tpot_s, "level": target.level, "margin": target.margin,
        },
        "cost_model": {"name": asked.cost.name, "source": asked.cost.source},
        "window": {
            "num_requests": window.num_requests, "requests_per_s": window.needed_rate, "start_s": window.options.start_s,
            "duration_s": window.options.duration_s, "instances_of_work": window.work * window.speed,
        },
        "notes": notes, "command": command, "out_of_time": plan.out_of_time, "alone": plan.alone._asdict(),
        "tried": [{"form": one.form._asdict(), "title": one.form.title, "at_load_with_margin": one.seen._asdict()} for one in plan.tried],
        "finalists": [
            {"form": one.form._asdict(), "title": one.form.title, "at_load": one.seen._asdict(), "carries": _plain(one.carried, window)}
            for one in plan.finalists
        ],
    }  # fmt: skip


def _plain(found: Carried, window: Window) -> dict[str, Any]:
    return {
        "requests_per_s": found.speed * window.rate, "fails_at_requests_per_s": found.fails_at * window.rate, "breaks": found.breaks,
        "curve": [{"requests_per_s": speed * window.rate, "attainment": share} for speed, share in found.curve],
    }  # fmt: skip
