"""Shared by the commands that talk to a cluster: its address, and how an answer and its phase record are shown.

The answer goes to stdout and everything about it to stderr, so that a pipe gets only the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...client import PhaseRecord, Stream, Usage
from ...protocol.tls import read_pem


def host_and_port(address: str | None) -> str | None:
    """Raises BadParameter for what gRPC would try to reach for seconds and then not understand."""
    if address is None:
        return None
    _, colon, port = address.rpartition(":")
    if "/" in address or not colon or not port.isdigit():
        raise typer.BadParameter(f"{address!r} is no host:port, as in {DEFAULT_ADDRESS}; without http://")
    return address


Address = Annotated[str, typer.Option(help="host:port of the proxy's gRPC face.", show_default=True, callback=host_and_port)]
DEFAULT_ADDRESS = "127.0.0.1:50051"
ApiKey = Annotated[str, typer.Option(envvar="HALFMOON_API_KEY", show_envvar=True, help="Where the cluster asks for one.")]
Authority = Annotated[
    Path | None,
    typer.Option("--ca", envvar="HALFMOON_CA", show_envvar=True, help="PEM of who signed the certificate of a cluster with TLS."),
]


def authority_of(file: Path | None) -> bytes | None:
    """Raises ConfigError."""
    return None if file is None else read_pem(file)


ControlAddress = Annotated[
    str, typer.Option("--control", help="host:port of the proxy's control.", show_default=True, callback=host_and_port)
]
DEFAULT_CONTROL = "127.0.0.1:50052"

_PHASES = (
    ("queue_s", "queued in the proxy"),
    ("prefill_queue_s", "queued at the prefill worker"),
    ("prefix_load_s", "cached prefix loaded"),
    ("prefill_s", "prefill"),
    ("push_s", "KV pushed, beyond the compute"),
    ("handoff_wait_s", "hand-off to decode"),
    ("first_decode_s", "first decode step"),
    ("decode_s", "decode"),
)


def print_stream(stream: Stream, console: Console) -> None:
    """Prints each piece of text as it comes, then an end of line."""
    for text in _pieces(stream):
        console.out(text, end="", highlight=False)
    console.out("")


def _pieces(stream: Stream) -> Iterator[str]:
    for event in stream:
        text: str = getattr(event, "text", "")
        if text:
            yield text


def phase_table(phases: PhaseRecord, usage: Usage) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("phase", style="dim")
    table.add_column("time", justify="right")
    for name, meaning in _PHASES:
        table.add_row(meaning, seconds(getattr(phases, name)))
    table.add_section()
    table.add_row("time to first token", seconds(phases.ttft_s), style="bold")
    table.add_row("time per output token", seconds(phases.tpot_s), style="bold")
    table.add_row("end to end", seconds(phases.e2e_s))
    table.add_row(
        "tokens: prompt (cached) + answer", f"{usage.num_prompt_tokens} ({usage.num_cached_tokens}) + {usage.num_completion_tokens}"
    )
    if phases.predicted_ttft_s:
        predicted = f"{seconds(phases.predicted_ttft_s)}, {seconds(phases.predicted_tpot_s)}"
        table.add_row("predicted: first token, per token", predicted, style="dim")
    table.add_row("workers", f"{phases.prefill_worker} → {phases.decode_worker} ({phases.transport or '-'})")
    if phases.num_attempts > 1:
        table.add_row("attempts", str(phases.num_attempts), style="yellow")
    return table


def seconds(value: float) -> str:
    """With the unit that leaves a few digits before the point."""
    return f"{value * 1e3:.1f} ms" if value < 1.0 else f"{value:.2f} s"
