"""A Halfmoon cluster in the foreground, from key=value arguments: what serving.py starts. Needs none of the command line's packages.

python tests/benchmarks/serving_halfmoon.py prefill.num_workers=1 decode.num_workers=1 proxy.http_port=8000
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from typing import Any

from halfmoon.deploy.cluster import find_model, running_cluster
from halfmoon.deploy.ray_session import RayNode, ray_session
from halfmoon.protocol.config import ClusterConfig


def main(arguments: list[str]) -> None:
    """Serves until SIGINT or SIGTERM."""
    logging.basicConfig(level="WARNING")
    config = ClusterConfig.load(None, dict(map(_setting, arguments)))
    find_model(config)
    with ray_session(None) as nodes:
        asyncio.run(_serve(config, nodes))


async def _serve(config: ClusterConfig, nodes: list[RayNode]) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    starting = asyncio.create_task(_run(config, nodes, stopped))
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
    if stopped.is_set() and not starting.done():
        starting.cancel()
    waiting.cancel()
    await asyncio.gather(starting, return_exceptions=stopped.is_set())


async def _run(config: ClusterConfig, nodes: list[RayNode], stopped: asyncio.Event) -> None:
    async with running_cluster(config, nodes, _notify) as supervisor:
        sys.stdout.write(f"serving at {supervisor.http_address}\n")
        sys.stdout.flush()
        await supervisor.watch()


def _notify(member_id: str, event: Any) -> None:
    if isinstance(event, str):
        sys.stdout.write(f"{member_id}: {event}\n")
        sys.stdout.flush()


def _setting(text: str) -> tuple[str, Any]:
    """ "a.b=3" -> ("a.b", 3); what is not JSON is a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"{text!r} is not key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    main(sys.argv[1:])
