"""`make demo`: one conversation about a document in a local cluster, through prefill, store and decode, with the cost of each turn.

The demo model answers right only if every KV byte arrived. Exits 0 if both answers are right and the second turn found the
first one's KV in the cache.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import NamedTuple

from rich.console import Console

from ..client import AsyncClient, Conversation
from ..protocol.config import ClusterConfig, DecodeConfig, PrefillConfig, ProxyConfig, StoreConfig
from ..protocol.errors import HalfmoonError
from .cli.progress import StartupProgress
from .cli.terminal import phase_table
from .cluster import running_cluster
from .ray_session import ray_session

CONFIG = ClusterConfig(
    store=StoreConfig(arena_bytes=256 * 2**20),
    proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0),
    prefill=PrefillConfig(num_workers=2),
    decode=DecodeConfig(num_workers=2),
)
DOCUMENT = (
    "The courier Mira carries key 4821. The baker Tomas lives in Kelford. The captain Odil keeps a grey parrot. "
    "The gardener Sena works in Brendale. The red box holds a compass. The green chest holds a lantern. Tovin plays the violin. "
    "The ship Corvane left the harbour on 14 May. The bell tower of Ostrand is 62 metres high. Lena's dog is called Rex. "
    "The password of the archive is 7-delta-92. The train to Velmont leaves at 9:40. The clockmaker Baro lives in Ostrand. "
    "The blue drawer holds a silver spoon. Project Heron is led by Ivana. The doctor Kalin carries key 3057. "
    "The museum in Kelford opens on Friday. Sena's cat is called Luna. The painter Rudi lives in Velmont."
)


class Turn(NamedTuple):
    text: str  # what the user says
    expected: str  # what the answer must contain


TURNS = (
    Turn(f"{DOCUMENT}\n\nWhich key does the courier Mira carry?", "4821"),
    Turn("And where does the painter Rudi live?", "Velmont"),
)


class Outcome(NamedTuple):
    num_right: int
    num_cached_tokens: int  # of the last turn


async def converse(address: str, console: Console) -> Outcome:
    """Raises a HalfmoonError."""
    conversation = Conversation()
    num_right = num_cached_tokens = 0
    async with AsyncClient(address) as client:
        for number, turn in enumerate(TURNS, 1):
            conversation.user(turn.text)
            console.print(f"\n[bold]turn {number}[/bold] > {turn.text}", highlight=False)
            stream = client.stream(messages=conversation.messages, max_tokens=48, temperature=0.0)
            async for text in stream.text():
                console.print(text, end="", style="cyan", highlight=False, markup=False)
            completion = await stream.completion()
            conversation.assistant(completion)
            right = turn.expected in completion.text
            num_right += right
            console.print("  [green]right[/green]" if right else f"  [red]wrong: {turn.expected} was expected[/red]", highlight=False)
            console.print(phase_table(completion.phases, completion.usage))
            num_cached_tokens = completion.usage.num_cached_tokens
    return Outcome(num_right, num_cached_tokens)


async def demo(console: Console) -> Outcome:
    with ray_session() as nodes, StartupProgress(console) as progress:
        async with running_cluster(CONFIG, nodes, progress.notify) as supervisor:
            progress.done(quiet=True)
            return await converse(supervisor.grpc_address, console)


def main() -> int:
    console = Console()
    start = time.monotonic()
    console.print("starting 1 proxy, 1 store, 2 prefill and 2 decode workers on a local Ray")
    try:
        outcome = asyncio.run(demo(console))
    except HalfmoonError as error:
        console.print(f"[red]{error.code}[/red]: {error.message}")
        return 1
    except KeyboardInterrupt:  # everything has been stopped on the way here
        console.print("interrupted", style="yellow")
        return 130
    console.print(
        f"\n{outcome.num_right} of {len(TURNS)} answers are right; the last turn reused {outcome.num_cached_tokens} cached tokens; "
        f"took {time.monotonic() - start:.1f} s",
        highlight=False,
    )
    return 0 if outcome.num_right == len(TURNS) and outcome.num_cached_tokens > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
