"""`halfmoon bench NAME …`: arguments after the name belong to the benchmark. `serve` is in the package, the others need a checkout."""

from __future__ import annotations

from typing import Annotated

import typer
import typer.main

from .bench import bench as run


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="serve (load on any OpenAI endpoint), or a file of tests/benchmarks, without .py.")],
) -> None:
    """Run one of the benchmarks, with its own arguments."""
    if name == "serve":
        _serve(context)
    else:
        run(name, context.args)


def _serve(context: typer.Context) -> None:
    from .bench_serve import serve

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command("serve")(serve)
    command = typer.main.get_command(alone)
    with command.make_context("halfmoon bench serve", context.args) as own:
        command.invoke(own)
