"""Recall through the whole cluster: held-out documents, questions answered exactly only if every KV byte arrived.

    halfmoon bench recall --modes shm,grpc,coupled,killed --lengths 50,500,1000,2000 --count 25

shm      1 prefill, 1 decode, KV through shared memory        coupled  no prefill worker: decode computes the prompt itself
grpc     the same, every KV byte through gRPC                 killed   2 + 2, a prefill and a decode worker killed on the way
Each conversation asks a first question and then follow-ups, which hit the prefix cache. With --reference, transformers' greedy
generate answers the same conversations and the answers are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

from halfmoon.client import AsyncClient, Control
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import RayNode, ray_session
from halfmoon.engine.demo_model.measure import PLAN, Example, examples
from halfmoon.engine.demo_model.measure import answer as reference_answer
from halfmoon.engine.demo_model.rows import Encoder
from halfmoon.engine.resolve import DEMO_FOLDER
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, PrefillConfig, ProxyConfig

MODES = ("shm", "grpc", "coupled", "killed")


@dataclasses.dataclass
class Tally:
    """Of one mode and length."""

    num_asked: int = 0
    num_right: int = 0
    num_follow_ups: int = 0
    num_prefix_hits: int = 0
    num_replayed: int = 0
    replies: list[list[str]] = dataclasses.field(default_factory=list)  # conversation by conversation


def configuration(mode: str) -> ClusterConfig:
    num_workers = 2 if mode == "killed" else 1
    transport: Any = "grpc" if mode == "grpc" else "auto"
    return ClusterConfig(
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0),
        prefill=PrefillConfig(num_workers=0 if mode == "coupled" else num_workers, transport=transport),
        decode=DecodeConfig(num_workers=num_workers, transport=transport),
    )


@asynccontextmanager
async def served(mode: str, nodes: Sequence[RayNode]) -> AsyncIterator[tuple[str, Control]]:
    async with running_cluster(configuration(mode), nodes) as supervisor:
        yield supervisor.grpc_address, Control(supervisor.control_address, supervisor.credentials.token)


async def converse(client: AsyncClient, example: Example, tally: Tally) -> list[str]:
    """The conversation with the model's own answers in it."""
    messages: list[dict[str, str]] = []
    replies: list[str] = []
    for turn in example.conversation.turns:
        if turn.kind is None or turn.kind == "talk":
            messages.append({"role": turn.role, "content": turn.text})
            continue
        completion = await client.generate(messages=messages, max_tokens=48, temperature=0.0)
        messages.append({"role": "assistant", "content": completion.text})
        tally.num_asked += 1
        tally.num_right += completion.text == turn.text and completion.finish_reason == "stop"
        tally.num_replayed += completion.phases.num_attempts > 1
        if replies:
            tally.num_follow_ups += 1
            tally.num_prefix_hits += completion.usage.num_cached_tokens > 0
        replies.append(completion.text)
    return replies


async def kill_workers(client: AsyncClient) -> None:
    """One of each role, as `kill -9` does."""
    for member in (await client.status()).members:
        if member.id in ("prefill-0", "decode-0"):
            os.kill(member.pid, signal.SIGKILL)


async def ask_all(address: str, control: Control, asked: Sequence[Example], killing: bool, advance: Callable[[], None]) -> Tally:
    tally = Tally(replies=[[] for _ in asked])
    numbers = iter(range(len(asked)))
    async with AsyncClient(address, control=control) as client:

        async def stream() -> None:
            for number in numbers:
                if killing and number == len(asked) // 3:
                    await kill_workers(client)
                tally.replies[number] = await converse(client, asked[number], tally)
                advance()

        await asyncio.gather(*(stream() for _ in range(4)))
    return tally


def reference_replies(asked: Sequence[Example], advance: Callable[[], None]) -> list[list[str]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    found: list[list[str]] = []
    for example in asked:
        messages: list[dict[str, str]] = []
        replies: list[str] = []
        for turn in example.conversation.turns:
            if turn.kind is None or turn.kind == "talk":
                messages.append({"role": turn.role, "content": turn.text})
                continue
            reply = reference_answer(model, tokenizer, messages).removesuffix("<|end|>")
            messages.append({"role": "assistant", "content": reply})
            replies.append(reply)
        found.append(replies)
        advance()
    return found


async def measure(arguments: argparse.Namespace, asked: dict[int, list[Example]]) -> dict[str, dict[int, Tally]]:
    tallies: dict[str, dict[int, Tally]] = {}
    with ray_session() as nodes, Progress(transient=True) as progress:
        for mode in arguments.modes:
            task = progress.add_task(mode, total=arguments.count * len(arguments.lengths))
            async with served(mode, nodes) as (address, control):
                tallies[mode] = {}
                for length in arguments.lengths:
                    # the workers die once, among the longest documents
                    killing = mode == "killed" and length == max(arguments.lengths)
                    tallies[mode][length] = await ask_all(address, control, asked[length], killing, partial(progress.advance, task))
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[50, 500, 1000, 2000])
    parser.add_argument("--count", type=int, default=25, help="documents of each length")
    parser.add_argument("--turns", type=int, default=4, help="questions about each document")
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--reference", action="store_true", help="compare with transformers' greedy generate")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    encoder = Encoder(Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json")))
    asked = {
        length: list(examples(encoder, length, arguments.count, arguments.seed, PLAN[: arguments.turns])) for length in arguments.lengths
    }
    tallies = asyncio.run(measure(arguments, asked))
    console = Console()
    references: dict[int, list[list[str]]] = {}
    if arguments.reference:
        torch.set_num_threads(1)
        with Progress(transient=True) as progress:
            task = progress.add_task("transformers", total=arguments.count * len(arguments.lengths))
            references = {length: reference_replies(asked[length], partial(progress.advance, task)) for length in arguments.lengths}
    table = Table("mode", "document tokens", "right", "follow-ups with a prefix hit", "replayed", "equal to transformers")
    for mode, by_length in tallies.items():
        for length, tally in by_length.items():
            pairs = list(zip(tally.replies, references.get(length, []), strict=False))
            equal = sum(mine == theirs for mine, theirs in pairs)
            table.add_row(
                mode,
                str(length),
                f"{tally.num_right} of {tally.num_asked} ({100 * tally.num_right / tally.num_asked:.1f} %)",
                f"{tally.num_prefix_hits} of {tally.num_follow_ups}",
                str(tally.num_replayed),
                f"{equal} of {len(pairs)} conversations" if pairs else "-",
            )
    console.print(table)
    if arguments.json:
        plain = {mode: {str(length): dataclasses.asdict(tally) for length, tally in found.items()} for mode, found in tallies.items()}
        arguments.json.write_text(json.dumps(plain, indent=2))


if __name__ == "__main__":
    main()
