"""`halfmoon serve`: a cluster in one command, until interrupted; then drained.

SIGHUP: read the configuration again and make the cluster like it. SIGUSR1: rolling restart. Each ends with one line, which starts with a
word of DONE.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from ...protocol.config import ClusterConfig
from ...protocol.errors import HalfmoonError
from ...protocol.tasks import beside
from ..cluster import find_model, running_cluster
from ..ray_session import hosts_joined, live_nodes, ray_session
from ..supervisor import Supervisor
from .progress import StartupProgress

console = Console(stderr=True)


DONE = ("applied:", "restarted:", "refused:")


@dataclass(frozen=True, slots=True)
class Serving:
    config: ClusterConfig
    reload: Callable[[], ClusterConfig]  # the configuration as its file is now
    num_hosts: int  # of Ray, to wait for before workers are placed


def serve(serving: Serving, address: str | None, log_level: str) -> None:
    """Raises an error of protocol/errors.py."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    find_model(serving.config)
    console.print("starting Ray" if address is None else f"joining Ray at {address}", style="dim")
    with ray_session(address):
        asyncio.run(_serve(serving))


async def _serve(serving: Serving) -> None:
    config = serving.config
    interrupted = asyncio.Event()
    orders: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    for number in (signal.SIGHUP, signal.SIGUSR1):
        loop.add_signal_handler(number, orders.put_nowait, number)
    async with beside(hosts_joined(serving.num_hosts, _say_hosts)) as joining, beside(interrupted.wait()) as waiting:
        await asyncio.wait([joining, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not joining.done():
            return
        joining.result()
    with StartupProgress(console) as progress:
        cluster = running_cluster(config, live_nodes(), progress.notify)
        async with beside(cluster.__aenter__()) as starting, beside(interrupted.wait()) as waiting:
            await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return
            supervisor = starting.result()
        progress.done()
    try:
        _print_endpoints(supervisor, config)
        obeying = _obey(orders, supervisor, serving.reload)
        async with beside(supervisor.watch()) as watching, beside(obeying) as obeying, beside(interrupted.wait()) as waiting:
            ended, _ = await asyncio.wait([watching, obeying, waiting], return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
            await _drain(supervisor, config.proxy.drain_timeout_s, interrupted)
    finally:
        await cluster.__aexit__(None, None, None)


def _say_hosts(found: int, wanted: int) -> None:
    console.print(f"{found} of {wanted} hosts have joined Ray", style="dim")


async def _obey(orders: asyncio.Queue[signal.Signals], supervisor: Supervisor, reload: Callable[[], ClusterConfig]) -> None:
    while True:
        order = await orders.get()
        try:
            if order is signal.SIGHUP:
                line = f"applied: {await supervisor.apply(reload())}"
            else:
                await supervisor.roll()
                line = "restarted: every worker, and stores where another host decodes"
        except HalfmoonError as error:
            line = f"refused: {error.message}"
        console.print(line, highlight=False, soft_wrap=True)


async def _drain(supervisor: Supervisor, timeout_s: float, interrupted: asyncio.Event) -> None:
    """A second signal ends the wait."""
    console.print(f"draining: no new requests, up to {timeout_s:g} s for those running (interrupt again to stop now)")
    interrupted.clear()
    async with beside(supervisor.drain(timeout_s)) as draining, beside(interrupted.wait()) as again:
        await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
        if draining.done() and draining.result():
            console.print(f"{draining.result()} requests were still running", style="yellow")


def _print_endpoints(supervisor: Supervisor, config: ClusterConfig) -> None:
    counts = {"prefill": config.prefill.num_workers, "decode": config.decode.num_workers, "prefill-and-decode": config.both.num_workers}
    workers = " and ".join(f"{count} {name}" for name, count in counts.items() if count) + " workers"
    if not counts["prefill"] and not counts["prefill-and-decode"]:
        workers += ", which prefill too"
    console.print(
        f"[bold green]serving[/bold green] with {workers}\n"
        f"  OpenAI HTTP  http://{supervisor.http_address}/v1\n"
        f"  gRPC         {supervisor.grpc_address}\n"
        f"  metrics      http://{supervisor.http_address}/metrics\n"
        f"  try          halfmoon chat --address {supervisor.grpc_address}",
        highlight=False,
    )
