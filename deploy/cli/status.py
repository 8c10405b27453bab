"""`halfmoon status`: the cluster at a glance, live on a terminal. --once prints it once, --json for programs."""

from __future__ import annotations

import json
import threading
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...client import Client, ClusterStatus, Percentiles, RoleChange
from ..token_file import find_control
from .terminal import DEFAULT_CONTROL, ControlAddress, seconds

PLAIN_WIDTH = 140  # of output that is not a terminal and so has no width of its own
WIDE = 120  # columns from which on addresses and nodes are shown, too
NUM_ROLE_CHANGES = 3
NODE_DIGITS = 8  # of a node's id, which has 56


def status(
    control: ControlAddress = DEFAULT_CONTROL,
    once: Annotated[bool, typer.Option("--once", help="Print it once and exit, as where the output is no terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it once, as JSON.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
) -> None:
    """Watch the cluster: members, queues, KV use, latencies."""
    with Client(control, control=find_control(control)) as client:
        found = client.status()
        if as_json:
            typer.echo(json.dumps(found.as_dict()))
        elif not (console := Console()).is_terminal:
            Console(width=PLAIN_WIDTH).print(picture(found, PLAIN_WIDTH))
        elif once:
            console.print(picture(found, console.width))
        else:
            _watch(client, found, interval)


def _watch(client: Client, found: ClusterStatus, interval_s: float) -> None:
    pause = threading.Event()  # never set; its wait is a sleep that ctrl-c can end
    try:
        with Live(picture(found, Console().width), auto_refresh=False) as live:
            while not pause.wait(interval_s):
                live.update(picture(client.status(), live.console.width), refresh=True)
    except KeyboardInterrupt:
        return


def picture(found: ClusterStatus, width: int) -> RenderableType:
    """width: columns that it is to be read at."""
    parts = [_headline(found), _members(found, wide=width >= WIDE), _latencies(found), _scheduling(found)]
    return Group(*parts, *map(_role_change, found.role_changes[:NUM_ROLE_CHANGES]))


def _headline(found: ClusterStatus) -> Text:
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.outcomes.items())) or "none yet"
    text = Text(f"{found.model or 'no model yet'}, up {_span(found.up_s)}")
    text.append(f"   waiting {found.num_queued}   running {found.num_running}   ended: {outcomes}")
    if found.draining:
        text.append("   draining", style="yellow")
    return text


def _members(found: ClusterStatus, *, wide: bool) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("member", "role", *(("address", "node") if wide else ()), "device"):
        table.add_column(name, no_wrap=True)
    for name in ("running", "waiting", "tokens", "KV use", "up"):
        table.add_column(name, justify="right", no_wrap=True)
    for member in found.members:
        where = (member.address, member.node_id[:NODE_DIGITS]) if wide else ()
        load = (str(member.num_running), str(member.num_waiting), str(member.num_outstanding_tokens), f"{member.kv_usage_ratio:.0%}")
        table.add_row(member.id, member.role, *where, member.device or "-", *load, _span(member.up_s))
    if not found.members:
        table.add_row("none has joined", style="yellow")
    return table


def _latencies(found: ClusterStatus) -> Table:
    table = Table("latency", box=None, header_style="dim", pad_edge=False)
    for name in ("p50", "p90", "p99", "requests"):
        table.add_column(name, justify="right")
    table.add_row("time to first token", *_row(found.ttft_s))
    table.add_row("time per output token", *_row(found.tpot_s))
    return table


def _scheduling(found: ClusterStatus) -> Text:
    text = Text(f"policy {found.policy}, admission {found.admission}, order {found.order}", style="dim")
    with_slo = found.num_in_slo + found.num_outside_slo
    if with_slo:
        text.append(f"   in SLO {found.num_in_slo / with_slo:.1%} of {with_slo}")
    if found.rejections:
        text.append("   refused by " + ", ".join(f"{who} {count}" for who, count in sorted(found.rejections.items())))
    if found.prediction_errors:
        errors = ", ".join(f"{name} {error:.0%}" for name, error in sorted(found.prediction_errors.items()))
        text.append(f"\npredictions are off by {errors}")
    return text


def _role_change(change: RoleChange) -> Text:
    text = Text(f"{_span(change.ago_s)} ago: {change.member} ", style="dim")
    if change.error:
        return text.append(f"stayed {change.former} and did not become {change.role}: {change.error}", style="yellow")
    return text.append(f"became {change.role} and was {change.former}: {change.reason}")


def _row(percentiles: Percentiles) -> tuple[str, ...]:
    if percentiles.count == 0:
        return ("-", "-", "-", "0")
    return (seconds(percentiles.p50), seconds(percentiles.p90), seconds(percentiles.p99), str(percentiles.count))


def _span(value_s: float) -> str:
    minutes, rest = divmod(int(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
