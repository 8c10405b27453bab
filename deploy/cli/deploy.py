"""`halfmoon deploy`: a cluster on hosts of its own, by `ray up`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...protocol.config import ClusterConfig
from ...protocol.errors import Unavailable
from ..launch.chart import write_chart
from ..launch.description import Description, Target
from ..launch.folder import read, write
from ..launch.launcher import Launcher, ray_command
from .serve_flags import overridden

Flag = typer.Option
Folder = Annotated[Path, typer.Argument(help="Of the deployment, as deploy init writes it.")]

deploy = typer.Typer(
    no_args_is_help=True, add_completion=False, help="A cluster on hosts of its own: write it, start it, change it, stop it."
)


@deploy.command()
def init(
    folder: Folder,
    target: Annotated[Target, Flag(help="local: hosts that are there; aws; gcp; kuberay: a Helm chart.")],
    name: Annotated[str, Flag(help="Of the cluster.")] = "halfmoon",
    model: Annotated[str | None, Flag(help="Folder of the model on each host. Without it: the demo model.")] = None,
    prefill: Annotated[int | None, Flag(help="Prefill workers.", min=0)] = None,
    decode: Annotated[int | None, Flag(help="Decode workers.", min=0)] = None,
    both: Annotated[int | None, Flag(help="Workers that do both.", min=0)] = None,
    gpus: Annotated[int, Flag(help="Of each host with workers; 0: on CPU.", min=0)] = 0,
    slo_ttft: Annotated[float | None, Flag(help="Seconds to the first token, for requests without an SLO.", min=0.0)] = None,
    slo_tpot: Annotated[float | None, Flag(help="Seconds between two tokens, likewise.", min=0.0)] = None,
    config: Annotated[Path | None, Flag(help="Settings to start from, as serve --config.")] = None,
    settings: Annotated[list[str] | None, Flag("--set", help="Any key of the configuration: store.arena_bytes=8589934592.")] = None,
    head: Annotated[str, Flag(help="local: address of the host with the proxy.")] = "",
    workers: Annotated[str, Flag(help="local: addresses of the other hosts, with commas.")] = "",
    ssh_user: Annotated[str, Flag(help="Who ssh logs in as; clouds: ubuntu.")] = "",
    ssh_key: Annotated[str, Flag(help="Private key; clouds: without it Ray makes one.")] = "",
    wheel: Annotated[str, Flag(help="Wheel of Halfmoon to install on each host; without it, it is there.")] = "",
    hosts: Annotated[int, Flag(help="aws, gcp: hosts beside the head; 0: as many as the workers need.", min=0)] = 0,
    region: Annotated[str, Flag(help="aws, gcp.")] = "",
    zone: Annotated[str, Flag(help="aws, gcp: availability zone.")] = "",
    project: Annotated[str, Flag(help="gcp: project id.")] = "",
    head_type: Annotated[str, Flag(help="aws, gcp: machine type of the head, which needs no GPU.")] = "",
    worker_type: Annotated[str, Flag(help="aws, gcp: machine type of the other hosts.")] = "",
    image: Annotated[str, Flag(help="aws: AMI; gcp: source image; kuberay: container image with Halfmoon.")] = "",
    overwrite: Annotated[bool, Flag("--overwrite", help="Write the folder's files anew.")] = False,
) -> None:
    """Write a deployment's files, and check them."""
    flags = {
        "model.path": model,
        "prefill.num_workers": (prefill or 0) if both else prefill,
        "decode.num_workers": (decode or 0) if both else decode,
        "both.num_workers": both,
        "proxy.ttft_slo_s": slo_ttft,
        "proxy.tpot_slo_s": slo_tpot,
        "security.insecure": True,  # seen in its file: no TLS until security.certs and proxy.tls_certificate are set
        "proxy.host": "0.0.0.0",  # clients reach it from elsewhere # nosec B104
        "model.device": "cuda" if gpus else "cpu",  # hosts whose GPUs are not found are an error, and not slow
    }
    description = Description(
        name=name,
        target=target,
        config=ClusterConfig.load(config, overridden(flags, settings)),
        num_gpus=gpus,
        num_hosts=hosts,
        head=head,
        workers=tuple(host.strip() for host in workers.split(",") if host.strip()),
        ssh_user=ssh_user,
        ssh_key=ssh_key,
        wheel=wheel,
        region=region,
        zone=zone,
        project=project,
        head_type=head_type,
        worker_type=worker_type,
        image=image,
    )
    if target is Target.KUBERAY:
        folder.mkdir(parents=True, exist_ok=True)
        checked = write_chart(description, folder)
        typer.echo(f"{folder} is written, {checked}; helm upgrade --install {name} {folder / 'chart'} -f {folder / 'values.yaml'}")
        return
    deployment = write(description, folder, overwrite)
    typer.echo(f"{folder} is written and checked; halfmoon deploy up {folder} starts {deployment.num_hosts} hosts")


@deploy.command()
def up(
    folder: Folder,
    restart_ray: Annotated[bool, Flag("--restart-ray", help="Start Ray on the head anew, after a reboot say; ends what runs.")] = False,
) -> None:
    """Start hosts, Ray and the cluster; of one that runs, change what the files say otherwise."""
    _launcher(folder).up(restart_ray)


@deploy.command()
def status(folder: Folder) -> None:
    """Members, queues and latencies, as halfmoon status shows them on the head."""
    _launcher(folder).status()


@deploy.command()
def restart(folder: Folder) -> None:
    """Restart workers and stores, host by host, while the others serve."""
    _launcher(folder).restart()


@deploy.command()
def down(folder: Folder) -> None:
    """Drain, and stop everything."""
    if problems := _launcher(folder).down():
        raise Unavailable("; ".join(problems))


def _launcher(folder: Path) -> Launcher:
    return Launcher(read(folder), typer.echo, ray_command())
