"""`halfmoon doctor`: what is wrong with this machine or a running cluster, the worst first, and what to do. Exit code 1 where there is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...protocol.config import ClusterConfig
from ...protocol.memory import human_bytes
from ..checks.finding import Finding, Severity
from ..doctor.examine import Report, examine_cluster, examine_machine
from ..doctor.links import Link
from ..token_file import find_control
from .serve_flags import overridden, setting
from .terminal import DEFAULT_CONTROL, ApiKey, Authority, ControlAddress, authority_of, host_and_port, phase_table

PLAIN_WIDTH = 140
STYLES: dict[Severity, str] = {"fault": "bold red", "slow": "bold yellow", "warning": "yellow", "ok": "green"}


def doctor(
    proxy: Annotated[
        str | None,
        typer.Option(
            help="host:port of a running cluster's gRPC face. Without it: this machine and the model folder.", callback=host_and_port
        ),
    ] = None,
    control: ControlAddress = DEFAULT_CONTROL,
    api_key: ApiKey = "",
    ca: Authority = None,
    model: Annotated[str | None, setting("model.path", "Folder that is to be served. Without it: the demo model.")] = None,
    config: Annotated[Path | None, typer.Option(help="Of halfmoon serve.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any key of the configuration, as for halfmoon serve.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Find what is wrong or slow, on this machine or in a running cluster."""
    if proxy is not None:
        report = asyncio.run(examine_cluster(proxy, find_control(control), api_key, authority_of(ca)))
    else:
        report = examine_machine(ClusterConfig.load(config, overridden({"model.path": model}, settings)))
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        console = Console()
        _print(report, console if console.is_terminal else Console(width=PLAIN_WIDTH))
    raise typer.Exit(0 if report.is_well else 1)


def _print(report: Report, console: Console) -> None:
    if report.is_well:
        console.print(f"[bold green]well[/]     {len(report.findings)} checks, nothing is wrong", highlight=False)
    console.print(_findings(report.findings))
    if report.links:
        console.print(_links(report.links))
    if report.phases is not None and report.usage is not None:
        console.print("\nthe probe request", style="dim")
        console.print(phase_table(report.phases, report.usage))


def _findings(findings: Sequence[Finding]) -> Table:
    """No heading: the first line names the worst."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("severity", no_wrap=True)
    table.add_column("check", no_wrap=True, style="dim")
    table.add_column("what")
    for found in findings:
        table.add_row(f"[{STYLES[found.severity]}]{found.severity}[/]", found.check, found.what)
        if found.remedy:
            table.add_row("", "", f"→ {found.remedy}", style="dim")
    return table


def _links(links: Sequence[Link]) -> Table:
    table = Table("link to", "transport", box=None, header_style="dim", pad_edge=False)
    for name in ("moved there and back", "took", "bandwidth"):
        table.add_column(name, justify="right")
    for one in links:
        table.add_row(
            one.store_id, one.transport, human_bytes(one.num_bytes), f"{one.seconds * 1e3:.1f} ms", f"{human_bytes(one.bytes_per_s)}/s"
        )
    return table
