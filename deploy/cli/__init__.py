"""The `halfmoon` command. A subcommand's module is imported only when it is called, so --help needs neither torch nor ray.

halfmoon ─► LazyGroup ─► COMMANDS[name] ─► a module of this folder ─► def <name>(…)
A HalfmoonError prints one line and exits with code 1.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Annotated, Any, NamedTuple

import typer
import typer.core
import typer.main

from ...protocol.errors import HalfmoonError
from ...protocol.version import package_version


class Command(NamedTuple):
    help: str  # its line in --help
    module: str  # holds a function or a Typer of the command's name
    settings: dict[str, Any] = {}  # noqa: RUF012 - click's context settings; never changed


COMMANDS = {
    "serve": Command("Start or join a cluster and serve a model until interrupted.", ".serve_flags"),
    "generate": Command("Continue a prompt; ends with the request's phase record.", ".generate"),
    "chat": Command("Talk with the model, turn by turn.", ".chat"),
    "status": Command("Watch the cluster: members, queues, KV use, latencies.", ".status"),
    "profile": Command("Measure a running cluster; writes a cost model for the simulator and the proxy.", ".profile"),
    "explain": Command("Tell why a recent request went where it went, or was refused.", ".explain"),
    "certs": Command("Make and renew certificates for TLS.", ".certs"),
    "keys": Command("Make, revoke and list API keys.", ".keys"),
    "deploy": Command("A cluster on hosts of its own: write it, start it, change it, stop it.", ".deploy"),
    "doctor": Command("Find what is wrong or slow, on this machine or in a running cluster.", ".doctor"),
    "dashboards": Command("Run Prometheus with Halfmoon's rules, or draw the dashboards.", ".dashboards"),
    "simulate": Command("Replay a trace against a simulated cluster, on a virtual clock.", ".simulate"),
    "plan": Command("How many GPUs a load needs within an SLO, and as what. Simulated.", ".plan"),
    "bench": Command(
        "Load any OpenAI endpoint (bench serve), or run one of the benchmarks of a checkout.",
        ".bench_flags",
        {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    ),
}


class LazyCommand(typer.core.TyperCommand):
    """Stands in for a subcommand until it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        command = COMMANDS[self.name]
        alone = typer.Typer(add_completion=False)
        module = importlib.import_module(command.module, __package__)
        found = getattr(module, self.name)
        if isinstance(found, typer.Typer):  # with commands of its own
            return typer.main.get_command(found).make_context(info_name, args, parent=parent, **extra)
        alone.command(self.name, context_settings=command.settings)(found)
        return typer.main.get_command(alone).make_context(info_name, args, parent=parent, **extra)


class LazyGroup(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return LazyCommand(cmd_name, help=COMMANDS[cmd_name].help) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and near:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HalfmoonError as error:
            problem = " ".join(error.message.split())
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("halfmoon"):
                raise
            problem = f"this command needs {error.name}: pip install 'halfmoon[server]'"
        typer.echo(f"halfmoon: {problem}", err=True)
        raise typer.Exit(1)


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"halfmoon {package_version()}")
        raise typer.Exit()


@app.callback()
def halfmoon(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Prefill/decode disaggregated LLM serving."""
