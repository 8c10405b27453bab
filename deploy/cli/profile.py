"""`halfmoon profile`: measures in under a minute what a running cluster's work costs. Shows measured beside fitted, writes a cost model."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...proxy.conductor.predictors.cost_model import CostModel
from ..profile import Profile
from ..profile import profile as measure
from ..profile_fit import PrefillPoint, StepPoint, predicted_prefill, predicted_step
from ..token_file import find_control
from .terminal import DEFAULT_ADDRESS, DEFAULT_CONTROL, ApiKey, Authority, ControlAddress, authority_of, seconds


def profile(
    address: Annotated[str, typer.Option("--address", "--endpoint", help="host:port of the proxy's gRPC face.")] = DEFAULT_ADDRESS,
    control: ControlAddress = DEFAULT_CONTROL,
    api_key: ApiKey = "",
    ca: Authority = None,
    out: Annotated[Path, typer.Option(help="The cost model's file.")] = Path("cost_model.yaml"),
    time: Annotated[float, typer.Option("--seconds", help="How long to measure.", min=5.0, max=600.0)] = 45.0,
    seed: Annotated[int | None, typer.Option(help="Of the prompts. The same one twice hits the cluster's cache.")] = None,
) -> None:
    """Measure a running cluster; writes a cost model for the simulator and the proxy. Nobody else may use the cluster meanwhile."""
    found_control = find_control(control)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("warm-up", total=1.0)
        found = asyncio.run(
            measure(
                address,
                found_control,
                api_key,
                authority_of(ca),
                seconds=time,
                seed=seed,
                progress=lambda share, what: bar.update(task, completed=share, description=what),
            )
        )
    Console().print(picture(found))
    found.model.save(out)
    Console(stderr=True).print(f"written to {out}", style="dim", highlight=False)


def picture(found: Profile) -> RenderableType:
    return Group(_measured(found), _facts(found))


def _measured(found: Profile) -> Table:
    model = found.model
    table = Table(
        title=f"{model.name}: {found.num_requests} requests in {found.seconds:.0f} s, medians",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("", "others busy", "measured", "fitted", "error", "times"):
        table.add_column(name, justify="right" if name else "left")
    lines = [
        *_lines(found.points.prefill, _prefill_case, lambda point: predicted_prefill(model, point)),
        *_lines(found.points.steps, _step_case, lambda point: predicted_step(model, point)),
    ]
    for line in lines:
        error = f"{line.fitted_s / line.measured_s - 1:+.0%}"
        table.add_row(line.name, str(line.num_others), seconds(line.measured_s), seconds(line.fitted_s), error, str(line.num_times))
    return table


class _Line(NamedTuple):
    name: str
    num_others: int  # other workers of its machine that computed at the same time, on average
    measured_s: float
    fitted_s: float
    num_times: int


def _lines(points: Iterable[Any], case: Callable[[Any], tuple[Any, str]], fitted: Callable[[Any], float]) -> list[_Line]:
    """Medians of each case, in order."""
    groups: dict[tuple[int, tuple[Any, str]], list[Any]] = {}
    for point in points:
        num_others = round(sum(num_busy * share for num_busy, share in point.busy) - 1)
        groups.setdefault((num_others, case(point)), []).append(point)
    return [
        _Line(name, num_others, statistics.median(one.seconds for one in group), statistics.median(map(fitted, group)), len(group))
        for (num_others, (_, name)), group in sorted(groups.items())
    ]


def _prefill_case(point: PrefillPoint) -> tuple[tuple[int, int], str]:
    behind = f" behind {point.num_prefix}" if point.num_prefix else ""
    return (point.num_prefix, point.num_new), f"prefill of {point.num_new}{behind}"


def _step_case(point: StepPoint) -> tuple[tuple[int, int], str]:
    """Grouped by powers of two for the batch and of four for its contexts, because a table can't show a hundred stretches."""
    size = 2 ** round(math.log2(point.num_sequences))
    context = 4 ** round(math.log2(point.num_kv_tokens / point.num_sequences) / 2)
    return (size, context), f"step of about {size}, {context} tokens each"


def _facts(found: Profile) -> Table:
    model: CostModel = found.model
    grid = Table.grid(padding=(0, 2))
    cores = (
        f"{model.num_cores:.2f} workers of a machine compute at full speed at once" if model.num_cores else "workers do not slow each other"
    )
    for name, value in (
        ("a token's KV", f"{model.kv_bytes_per_token} bytes in {model.num_layers} layers"),
        ("an instance's pages, a node's cache", f"{model.kv_capacity_tokens}, {model.cache_tokens} tokens"),
        ("link", f"{model.link_bytes_per_s / 1e9:.2f} GB/s"),
        ("a first token beside its prefill", seconds(model.request_s)),
        ("shared cores", cores),
    ):
        grid.add_row(name, value)
    return grid
