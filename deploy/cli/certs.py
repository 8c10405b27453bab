"""`halfmoon certs init|rotate FOLDER`: certificates for TLS between members (security.certs) and at the clients' ports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..certificates import init as make
from ..certificates import names_of
from ..certificates import rotate as renew

Flag = typer.Option
Folder = Annotated[Path, typer.Argument(help="Of the certificates. Keep it to yourself.")]
Names = Annotated[list[str] | None, Flag("--name", help="Host or address that clients call the cluster by, beside loopback's.")]
Days = Annotated[int, Flag(help="That members' and front's certificates hold.", min=1)]

certs = typer.Typer(no_args_is_help=True, help="Make and renew certificates.")


@certs.command()
def init(folder: Folder, name: Names = None, days: Days = 365) -> None:
    """Make an authority, and certificates of members and front."""
    make(folder, name or [], days)
    _say(folder)


@certs.command()
def rotate(folder: Folder, name: Names = None, days: Days = 365) -> None:
    """Make new certificates under the same authority. A running cluster takes them within seconds, for new connections."""
    renew(folder, name or [], days)
    _say(folder)


def _say(folder: Path) -> None:
    typer.echo(f"{folder} holds certificates for members and for {', '.join(names_of(folder))}")
