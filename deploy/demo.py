"""`make demo`: a local cluster, one conversation of two turns through prefill, store and decode, and what each cost.

Exits 0 only if both turns answered and the second one found the first one's KV in the cache.
"""

from __future__ import annotations

import asyncio
import sys
import time

from rich.console import Console

from ..client import AsyncClient
from ..protocol.config import ClusterConfig, DecodeConfig, PrefillConfig, ProxyConfig
from ..protocol.errors import HalfmoonError
from .cli.progress import StartupProgress
from .cli.terminal import phase_table
from .cluster import running_cluster
from .ray_session import ray_session

CONFIG = ClusterConfig(
    proxy=ProxyConfig(http_port=0, grpc_port=0), prefill=PrefillConfig(num_workers=2), decode=DecodeConfig(num_workers=2)
)
DOCUMENT = (
    "The courier Mira carries key 4821. The baker Tomas lives in the tower by the river. The captain Odil keeps a grey parrot. "
    "The gardener Sena planted nine pear trees behind the mill. The clockmaker Baro repairs the bell of the old harbour."
)
QUESTIONS = (f"{DOCUMENT} Which key does the courier Mira carry?", "Where does the baker Tomas live?")


async def converse(address: str, console: Console) -> int:
    """Both turns; returns the cached tokens of the second."""
    messages: list[dict[str, str]] = []
    num_cached_tokens = 0
    async with AsyncClient(address) as client:
        for turn, question in enumerate(QUESTIONS, 1):
            messages.append({"role": "user", "content": question})
            console.print(f"\n[bold]turn {turn}[/bold] > {question}", highlight=False)
            stream = client.stream(messages=messages, max_tokens=48, temperature=0.0)
            async for text in stream.text():
                console.print(text, end="", style="cyan", highlight=False, markup=False)
            result = await stream.completion()
            console.print()
            console.print(phase_table(result.phases, result.usage))
            messages.append({"role": "assistant", "content": result.text})
            num_cached_tokens = result.usage.num_cached_tokens
    return num_cached_tokens


async def demo(console: Console) -> int:
    with ray_session() as nodes, StartupProgress(console) as progress:
        async with running_cluster(CONFIG, nodes, progress.notify) as supervisor:
            progress.done()
            num_cached_tokens = await converse(supervisor.grpc_address, console)
    if num_cached_tokens == 0:
        console.print("[red]the second turn found nothing of the first in the cache[/red]")
        return 1
    console.print(f"\n[bold green]ok[/bold green]: the second turn reused {num_cached_tokens} cached tokens of the first", highlight=False)
    return 0


def main() -> int:
    console = Console()
    start = time.monotonic()
    console.print("starting 1 proxy, 1 store, 2 prefill and 2 decode workers on a local Ray")
    try:
        status = asyncio.run(demo(console))
    except HalfmoonError as error:
        console.print(f"[red]{error.code}[/red]: {error.message}")
        return 1
    console.print(f"took {time.monotonic() - start:.1f} s", style="dim")
    return status


if __name__ == "__main__":
    sys.exit(main())
