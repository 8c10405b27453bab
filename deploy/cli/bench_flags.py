"""`halfmoon bench NAME …`: what follows the name is the benchmark's own."""

from __future__ import annotations

from typing import Annotated

import typer

from .bench import bench as run


def bench(context: typer.Context, name: Annotated[str, typer.Argument(help="File of tests/benchmarks, without .py.")]) -> None:
    """Run one of the benchmarks of a checkout, with its own arguments."""
    run(name, context.args)
