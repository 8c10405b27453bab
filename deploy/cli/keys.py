"""`halfmoon keys add|revoke|list`: the API keys that a proxy with proxy.keys_file asks for. A running proxy sees a change at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...protocol.errors import ConfigError
from ...proxy.tenants.keys_file import KeysFile

Flag = typer.Option
File = Annotated[Path, Flag("--file", help="As proxy.keys_file says.")]
DEFAULT_FILE = Path("keys.json")
PLAIN_WIDTH = 140

keys = typer.Typer(no_args_is_help=True, help="Make, revoke and list API keys.")


@keys.command()
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is. All keys of a tenant share its limits and its cached prefixes.")],
    file: File = DEFAULT_FILE,
    requests_per_minute: Annotated[int | None, Flag(help="Of the tenant; 0: no limit.", min=0)] = None,
    tokens_per_minute: Annotated[int | None, Flag(help="Of the tenant, prompts and answers; 0: no limit.", min=0)] = None,
    tokens_per_day: Annotated[int | None, Flag(help="Likewise; a day begins at midnight UTC.", min=0)] = None,
    tokens_per_month: Annotated[int | None, Flag(help="Likewise; a month begins on its first day, at midnight UTC.", min=0)] = None,
    first_priority: Annotated[int | None, Flag(help="Lowest priority number of its requests: the soonest served.")] = None,
) -> None:
    """Make a key and print it, this once. Limits that are given hold for the tenant from now on."""
    known = KeysFile.load(file) if file.exists() else KeysFile({}, {})
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "tokens_per_month": tokens_per_month,
        "first_priority": first_priority,
    }
    changed, key = known.with_key(tenant, {name: value for name, value in given.items() if value is not None})
    _saved(lambda: changed.save(file), file)
    typer.echo(key)


@keys.command()
def revoke(key_id: Annotated[str, typer.Argument(help="As `halfmoon keys list` shows it.")], file: File = DEFAULT_FILE) -> None:
    """Make a key worthless from its next request on."""
    changed = KeysFile.load(file).without_key(key_id)
    _saved(lambda: changed.save(file), file)


@keys.command("list")
def list_keys(file: File = DEFAULT_FILE) -> None:
    """Show the keys by their ids, their tenants and limits."""
    known = KeysFile.load(file)
    table = Table("key", "tenant", "made", box=None, header_style="dim", pad_edge=False)
    for name in ("requests a minute", "tokens a minute", "a day", "a month", "first priority"):
        table.add_column(name, justify="right")
    for key_id, record in known.keys.items():
        limits = known.tenants[record.tenant]
        counts = (limits.requests_per_minute, limits.tokens_per_minute, limits.tokens_per_day, limits.tokens_per_month)
        table.add_row(key_id, record.tenant, record.created, *(str(count or "-") for count in counts), str(limits.first_priority))
    console = Console()
    (console if console.is_terminal else Console(width=PLAIN_WIDTH)).print(table)


def _saved(save: Callable[[], None], file: Path) -> None:
    """Raises ConfigError."""
    try:
        save()
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
