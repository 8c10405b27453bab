"""`halfmoon serve`: a cluster in one command, until interrupted; then drained.

SIGHUP: read the configuration again and make the cluster like it. SIGUSR1: rolling restart. Each ends with one line, which begins with a
word of deploy/change.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...client import Control
from ...engine.gpus import visible_gpus
from ...engine.resolve import torch_has_cuda
from ...protocol.config import ClusterConfig, SecurityConfig
from ...protocol.credentials import Credentials, read_token
from ...protocol.errors import ConfigError, HalfmoonError
from ...protocol.tasks import beside
from ...protocol.tls import Tls
from ...protocol.v1 import control_pb2
from ..capacity import describe_capacity, read_status
from ..change import APPLIED, REFUSED, RESTARTED
from ..checks.before_start import require_startable
from ..checks.exposure import exposure
from ..checks.finding import Finding
from ..checks.model import check_parsers, check_sampling
from ..cluster import running_cluster
from ..plan import ClusterPlan, count_gpus, couple_on_one_gpu, make_plan
from ..ray_session import hosts_joined, live_nodes, ray_session
from ..supervisor import Supervisor
from ..token_file import token_file
from .progress import StartupProgress

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Serving:
    config: ClusterConfig
    reload: Callable[[], ClusterConfig]  # the configuration as its file is now
    num_hosts: int  # of Ray, to wait for before workers are placed
    counts_given: bool  # the user said how many workers

    def fitted(self, config: ClusterConfig, num_gpus: int) -> ClusterConfig:
        """For a user who gave no numbers of workers: as many as one GPU takes."""
        return config if self.counts_given else couple_on_one_gpu(config, num_gpus)


def serve(serving: Serving, address: str | None, log_level: str) -> None:
    """Raises an error of protocol/errors.py."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = serving.config
    if address is None and torch_has_cuda():
        config = serving.fitted(config, len(visible_gpus()))
    _print_findings(require_startable(config, own_ray=address is None))
    credentials = _credentials(config.security)
    console.print("starting Ray" if address is None else f"joining Ray at {address}", style="dim")
    with ray_session(address):
        asyncio.run(_serve(serving, credentials))


def _credentials(security: SecurityConfig) -> Credentials:
    """Raises ConfigError for files that cannot be used."""
    credentials = Credentials.from_environment() or Credentials.make()
    tls = Tls.of_members(Path(security.certs).expanduser()) if security.certs else None
    token = read_token(Path(security.metrics_token_file)) if security.metrics_token_file else ""
    return dataclasses.replace(credentials, tls=tls, metrics_token=token)


async def _serve(serving: Serving, credentials: Credentials) -> None:
    interrupted = asyncio.Event()
    orders: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    for number in (signal.SIGHUP, signal.SIGUSR1):
        loop.add_signal_handler(number, orders.put_nowait, number)
    async with beside(hosts_joined(serving.num_hosts, _say)) as joining, beside(interrupted.wait()) as waiting:
        await asyncio.wait([joining, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not joining.done():
            return
        joining.result()
    nodes = live_nodes()
    num_gpus = count_gpus(nodes)
    config = serving.fitted(serving.config, num_gpus)
    _require_secure(config, make_plan(config, nodes))
    certs = str(Path(config.security.certs).expanduser()) if config.security.certs else ""
    with StartupProgress(console) as progress:
        cluster = running_cluster(config, nodes, progress.notify, credentials)
        async with beside(cluster.__aenter__()) as starting, beside(interrupted.wait()) as waiting:
            await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return
            supervisor = starting.result()
        progress.done()
    control = Control(supervisor.control_address, credentials.token, certs)
    try:
        with token_file(control):
            _print_endpoints(supervisor, config, supervisor.spec.plan.device)
            _print_line(check_sampling(supervisor.spec.model_folder, config.model))
            _print_line(await asyncio.to_thread(check_parsers, supervisor.spec.model_folder, config.model))
            _print_capacity(await read_status(control), supervisor.spec.max_model_len)
            obeying = _obey(orders, supervisor, lambda: serving.fitted(serving.reload(), num_gpus))
            async with beside(supervisor.watch()) as watching, beside(obeying) as obeying, beside(interrupted.wait()) as waiting:
                ended, _ = await asyncio.wait([watching, obeying, waiting], return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
                await _drain(supervisor, config.proxy.drain_timeout_s, interrupted)
    finally:
        await cluster.__aexit__(None, None, None)


def _require_secure(config: ClusterConfig, plan: ClusterPlan) -> None:
    """Raises ConfigError for a cluster that others can use or read, unless that is said to be meant. Then it is said loudly."""
    found = exposure(config, plan)
    if found and not config.security.insecure:
        told = "; ".join(f"{finding.what}: {finding.remedy}" for finding in found)
        raise ConfigError(f"{told}; or say --insecure to start it all the same")
    for finding in found:
        console.print(f"INSECURE: {finding.what}", style="bold red", highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    console.print(line, style="dim")


async def _obey(orders: asyncio.Queue[signal.Signals], supervisor: Supervisor, reload: Callable[[], ClusterConfig]) -> None:
    while True:
        order = await orders.get()
        try:
            if order is signal.SIGHUP:
                line = f"{APPLIED} {await supervisor.apply(reload())}"
            else:
                await supervisor.roll()
                line = f"{RESTARTED} every worker, and stores where another host decodes"
        except HalfmoonError as error:
            line = f"{REFUSED} {error.message}"
        console.print(line, highlight=False, soft_wrap=True)


async def _drain(supervisor: Supervisor, timeout_s: float, interrupted: asyncio.Event) -> None:
    """A second signal ends the wait."""
    console.print(f"draining: no new requests, up to {timeout_s:g} s for those running (interrupt again to stop now)")
    interrupted.clear()
    async with beside(supervisor.drain(timeout_s)) as draining, beside(interrupted.wait()) as again:
        await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
        if draining.done() and draining.result():
            console.print(f"{draining.result()} requests were still running", style="yellow")


def _print_findings(findings: Iterable[Finding]) -> None:
    for found in findings:
        console.print(found.told, style="" if found.severity == "ok" else "yellow", highlight=False)


def _print_capacity(status: control_pb2.StatusReply, wanted_len: int) -> None:
    """How many tokens fit where."""
    for found in describe_capacity(status.members, wanted_len):
        _print_line(found)


def _print_line(found: Finding) -> None:
    console.print(f"  {found.check:<12} {found.told}", style="" if found.severity == "ok" else "yellow", highlight=False)


def _print_endpoints(supervisor: Supervisor, config: ClusterConfig, device: str) -> None:
    counts = {"prefill": config.prefill.num_workers, "decode": config.decode.num_workers, "prefill-and-decode": config.both.num_workers}
    workers = " and ".join(f"{count} {name}" for name, count in counts.items() if count) + " workers"
    if not counts["prefill"] and not counts["prefill-and-decode"]:
        workers += ", which prefill too"
    console.print(
        f"[bold green]serving[/bold green] with {workers} on {'CPU' if device == 'cpu' else 'CUDA'}\n"
        f"  OpenAI HTTP  {'https' if config.proxy.tls_certificate else 'http'}://{supervisor.http_address}/v1\n"
        f"  gRPC         {supervisor.grpc_address}\n"
        f"  control      {supervisor.control_address}, for members and operators\n"
        f"  metrics      {'https' if config.security.certs else 'http'}://{supervisor.metrics_address}/metrics\n"
        f"  try          halfmoon chat --address {supervisor.grpc_address}",
        highlight=False,
    )
