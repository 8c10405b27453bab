"""`halfmoon serve`: a cluster in one command, until interrupted; then drained."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterable

from rich.console import Console

from ...engine.gpus import visible_gpus
from ...engine.resolve import torch_has_cuda
from ...protocol.config import ClusterConfig
from ...protocol.tasks import beside
from ...protocol.v1 import control_pb2
from ..capacity import describe_capacity, read_status
from ..checks.before_start import require_startable
from ..checks.finding import Finding
from ..cluster import running_cluster
from ..plan import count_gpus, couple_on_one_gpu
from ..ray_session import RayNode, ray_session
from ..supervisor import Supervisor
from .progress import StartupProgress

console = Console(stderr=True)


def serve(config: ClusterConfig, address: str | None, log_level: str, *, counts_given: bool = True) -> None:
    """counts_given: the user said how many workers. Raises an error of protocol/errors.py."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if address is None and not counts_given and torch_has_cuda():
        config = couple_on_one_gpu(config, len(visible_gpus()))
    _print_findings(require_startable(config, own_ray=address is None))
    console.print("starting Ray" if address is None else f"joining Ray at {address}", style="dim")
    with ray_session(address) as nodes:
        if not counts_given:
            config = couple_on_one_gpu(config, count_gpus(nodes))
        asyncio.run(_serve(config, nodes))


async def _serve(config: ClusterConfig, nodes: list[RayNode]) -> None:
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    with StartupProgress(console) as progress:
        cluster = running_cluster(config, nodes, progress.notify)
        async with beside(cluster.__aenter__()) as starting, beside(interrupted.wait()) as waiting:
            await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return
            supervisor = starting.result()
        progress.done()
    try:
        _print_endpoints(supervisor, config, supervisor.spec.plan.device)
        _print_capacity(await read_status(supervisor.grpc_address), supervisor.spec.max_model_len)
        async with beside(supervisor.watch()) as watching, beside(interrupted.wait()) as waiting:
            await asyncio.wait([watching, waiting], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            await _drain(supervisor, config.proxy.drain_timeout_s, interrupted)
    finally:
        await cluster.__aexit__(None, None, None)


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
        console.print(f"  {found.check:<12} {found.told}", style="" if found.severity == "ok" else "yellow", highlight=False)


def _print_endpoints(supervisor: Supervisor, config: ClusterConfig, device: str) -> None:
    counts = {"prefill": config.prefill.num_workers, "decode": config.decode.num_workers, "prefill-and-decode": config.both.num_workers}
    workers = " and ".join(f"{count} {name}" for name, count in counts.items() if count) + " workers"
    if not counts["prefill"] and not counts["prefill-and-decode"]:
        workers += ", which prefill too"
    console.print(
        f"[bold green]serving[/bold green] with {workers} on {'CPU' if device == 'cpu' else 'CUDA'}\n"
        f"  OpenAI HTTP  http://{supervisor.http_address}/v1\n"
        f"  gRPC         {supervisor.grpc_address}\n"
        f"  metrics      http://{supervisor.http_address}/metrics\n"
        f"  try          halfmoon chat --address {supervisor.grpc_address}",
        highlight=False,
    )
