"""`halfmoon explain REQUEST_ID`: why a request went where it went, what was predicted for it, and what was measured."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...client import Candidate, Client, DecisionAttempt, Explanation, Prediction
from ..token_file import find_control
from .terminal import DEFAULT_CONTROL, ControlAddress, seconds

PREDICTED = {
    "queue": "waiting for other prompts",
    "ssd": "read from SSD",
    "transfer": "cached prefix loaded",
    "prefill": "prefill, its own part",
    "handoff": "hand-off and calls",
    "ttft": "time to first token",
    "promised": "the same, for nine of ten",
    "tpot": "time per output token",
}
FAR_OFF = 0.5  # relative errors from here on are highlighted


def explain(
    request_id: Annotated[str, typer.Argument(help="As it stands in the answer, or in the x-request-id header.")],
    control: ControlAddress = DEFAULT_CONTROL,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Tell why a recent request went where it went, or was refused."""
    with Client(control, control=find_control(control)) as client:
        found = client.explain(request_id)
    if as_json:
        typer.echo(json.dumps([one.as_dict() for one in found]))
    else:
        Console().print(Group(*map(picture, found)))


def picture(found: Explanation) -> RenderableType:
    parts: list[RenderableType] = [_headline(found)]
    for number, attempt in enumerate(found.attempts, 1):
        if len(found.attempts) > 1:
            parts.append(Text(f"attempt {number}, {seconds(attempt.at_s)} after the arrival", style="bold"))
        parts += [_verdict(attempt), _prefill_table(attempt), _decode_table(attempt)]
        if attempt.predictions:
            parts.append(_prediction_table(attempt.predictions))
        if attempt.error:
            parts.append(Text(f"failed: {attempt.error}", style="yellow"))
    return Group(*parts, Text(""))


def _headline(found: Explanation) -> Text:
    text = Text(f"{found.request_id}: {found.state}", style="bold")
    slos = [f"{name} {seconds(value)}" for name, value in (("TTFT", found.ttft_slo_s), ("TPOT", found.tpot_slo_s)) if value]
    lines = [
        f"{found.num_tokens} prompt tokens, SLO {' and '.join(slos) or 'none'}, priority {found.priority}; came {seconds(found.age_s)} ago",
        f"policy {found.policy}, admission {found.admission}",
    ]
    if found.ended:
        lines.append(f"ended: {found.ended}")
    return text.append("\n" + "\n".join(lines), style="not bold")


def _verdict(attempt: DecisionAttempt) -> Text:
    if attempt.rejection_code:
        again = f" (retry after {seconds(attempt.retry_after_s)})" if attempt.retry_after_s else ""
        return Text(f"refused, {attempt.rejection_code}: {attempt.reason}{again}", style="yellow")
    text = Text(attempt.reason)
    if attempt.prefix_store:
        text.append(f"\n{attempt.prefix_blocks} blocks of its prefix come from the store at {attempt.prefix_store}")
    return text


def _prefill_table(attempt: DecisionAttempt) -> Table:
    table = Table("", f"prefill ({_listed(attempt.prefill, attempt.num_prefill)})", box=None, header_style="dim", pad_edge=False)
    for name in ("cached blocks", "tokens ahead", "queue", "SSD", "transfer", "prefill", "first token"):
        table.add_column(name, justify="right")
    for one in attempt.prefill:
        times = (one.queue_s, one.ssd_s, one.transfer_s, one.prefill_s, one.ttft_s)
        counts = (str(one.num_cached_blocks), str(one.num_outstanding_tokens))
        table.add_row(_mark(one), one.id, *counts, *map(seconds, times), style=_style(one))
    return table


def _decode_table(attempt: DecisionAttempt) -> Table:
    table = Table("", f"decode ({_listed(attempt.decode, attempt.num_decode)})", box=None, header_style="dim", pad_edge=False)
    for name in ("cached blocks", "tokens", "running", "step"):
        table.add_column(name, justify="right")
    for one in attempt.decode:
        counts = (one.num_cached_blocks, one.num_outstanding_tokens, one.num_running)
        table.add_row(_mark(one), one.id, *map(str, counts), seconds(one.step_s), style=_style(one))
    return table


def _prediction_table(predictions: tuple[Prediction, ...]) -> Table:
    table = Table("of this request", box=None, header_style="dim", pad_edge=False)
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right")
    for one in predictions:
        error = one.relative_error
        measured = seconds(one.measured_s) if one.measured_s is not None else "-"
        off = f"{error:+.0%}" if error is not None else "-"
        style = "yellow" if error is not None and abs(error) > FAR_OFF else ""
        table.add_row(PREDICTED.get(one.name, one.name), seconds(one.predicted_s), measured, off, style=style)
    return table


def _listed(candidates: tuple[Candidate, ...], total: int) -> str:
    return f"{len(candidates)} of {total}" if len(candidates) < total else str(len(candidates))


def _mark(one: Candidate) -> str:
    return "→" if one.chosen else ""


def _style(one: Candidate) -> str:
    return "bold" if one.chosen else ""
