"""`halfmoon dashboards up`: Prometheus for a running cluster, on this machine, with our rules; `draw`: the dashboards as pictures."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml

from ...protocol.credentials import read_token
from ...protocol.errors import ConfigError, Unavailable
from ...protocol.tls import MEMBER_NAME, read_pem
from ..page_opener import page_opener

DEPLOY = Path(__file__).parents[1]


class Action(StrEnum):
    UP = "up"
    DRAW = "draw"


def dashboards(
    action: Annotated[Action, typer.Argument(help="up: run Prometheus until interrupted; draw: write pictures of the dashboards.")],
    proxy: Annotated[str, typer.Option(help="host:port of the proxy's metrics.")] = "127.0.0.1:8001",
    ca: Annotated[Path | None, typer.Option(help="authority.pem of a cluster whose members have TLS.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="As security.metrics_token_file, of a cluster whose pages ask for a token.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of Prometheus, on loopback.")] = 9090,
    data: Annotated[Path | None, typer.Option(help="Folder of Prometheus' data; none: a temporary one, gone at the end.")] = None,
    out: Annotated[Path, typer.Option(help="draw: folder of the pictures.")] = Path("dashboards"),
    minutes: Annotated[float, typer.Option(help="draw: how far back.", min=1.0)] = 15.0,
) -> None:
    """Prometheus with Halfmoon's rules, and its dashboards for Grafana or as pictures."""
    if action is Action.UP:
        _up(proxy, ca, token_file, port, data)
    else:
        _draw(f"http://127.0.0.1:{port}", out, minutes * 60)


def configure(folder: Path, proxy: str, interval: str = "", ca: Path | None = None, token_file: Path | None = None) -> Path:
    """Writes Prometheus' configuration and rules for the cluster of this proxy into folder. interval: of scrapes; empty: the file's.

    ca: who signed the certificate of its pages. None: they have no TLS. token_file: with the token that they ask for;
    None: they ask for none.
    """
    shutil.copytree(DEPLOY / "prometheus", folder, dirs_exist_ok=True)
    path = folder / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    scraped = config["scrape_configs"][0]
    found = scraped["http_sd_configs"][0]
    found["url"] = f"{'http' if ca is None else 'https'}://{proxy}/metrics/targets"
    for asked in (scraped, found):
        if ca is not None:
            asked["tls_config"] = {"ca_file": _whole(ca), "server_name": MEMBER_NAME}
        if token_file is not None:
            asked["authorization"] = {"type": "Bearer", "credentials_file": _whole(token_file)}
    if interval:
        config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _whole(path: Path) -> str:
    """For Prometheus, whose relative paths begin at its configuration."""
    return str(path.expanduser().resolve())


def arguments(config: Path, data: Path, port: int) -> list[str]:
    """Of the prometheus command. Exemplars lead from a latency to its trace."""
    return [
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]


def _up(proxy: str, ca: Path | None, token_file: Path | None, port: int, data: Path | None) -> None:
    command = shutil.which("prometheus")
    if command is None:
        raise ConfigError("there is no prometheus command here; install it (Debian's package is called prometheus) and call this again")
    _require_proxy(proxy, ca, "" if token_file is None else read_token(token_file))
    with tempfile.TemporaryDirectory() as folder:
        config = configure(Path(folder, "config"), proxy, ca=ca, token_file=token_file)
        typer.echo(f"Prometheus at http://127.0.0.1:{port} scrapes what {proxy}/metrics/targets lists")
        typer.echo(f"Grafana: add it as a Prometheus data source and import the dashboards in {DEPLOY / 'grafana'}")
        running = subprocess.Popen([command, *arguments(config, data or Path(folder, "data"), port)])
        try:
            code = running.wait()
        except KeyboardInterrupt:  # Prometheus got it, too
            code = 0 if running.wait() in (0, -2) else 1
    if code:
        raise ConfigError(f"prometheus ended with {code}; what it wrote above says why. Is port {port} taken? --port names another")


def _require_proxy(proxy: str, ca: Path | None, token: str) -> None:
    """Raises Unavailable, ConfigError."""
    opener = page_opener(None if ca is None else read_pem(ca.expanduser()), token)
    try:
        with opener(f"{proxy}/metrics/targets", 5.0):
            pass
    except OSError as error:
        raise Unavailable(
            f"no proxy answers at {proxy}/metrics/targets ({error}); --proxy names the address of its metrics, "
            "--ca the authority.pem of a cluster whose members have TLS, and --token-file the token of one whose pages ask for it"
        ) from error


def _draw(prometheus: str, out: Path, span_s: float) -> None:
    from ..dashboards.draw import Source, draw

    out.mkdir(parents=True, exist_ok=True)
    for board in sorted((DEPLOY / "grafana").glob("*.json")):
        picture = out / f"{board.stem}.png"
        draw(board, Source(prometheus), span_s, picture)
        typer.echo(str(picture))
