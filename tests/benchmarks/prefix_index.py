"""The prefix index with 1 M blocks of 64 stores: look-up of a 128k-token prompt, bytes a block, blocks learned a second.

halfmoon bench prefix_index [--json FILE]

Every prompt is 131,072 tokens long; 100 documents are held, each whole by one store and cut at random depths by three others.
look-up: leading_runs. But for the last row other prompts were looked up before, so that little of the table is in the CPU's caches.
hash: token ids to block keys, which every prompt needs before its look-up. expect: what a placement of an unknown prompt adds.
drop: what a store's end costs at once; the rest of its blocks leave with later changes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.proxy.prefixes.index import PrefixIndex

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS = 131_072
NUM_BLOCKS = 1_000_000
NUM_STORES = 64
CHANGE_BLOCKS = 256  # in one Watch message
BLOCK_SIZES = (16, 64, 512)


def documents(block_size: int, rng: random.Random) -> list[list[bytes]]:
    """Chains of block keys, NUM_BLOCKS in all."""
    length = NUM_TOKENS // block_size
    return [[rng.randbytes(16) for _ in range(length)] for _ in range(NUM_BLOCKS // length)]


def changes(chains: Sequence[Sequence[bytes]], rng: random.Random) -> list[tuple[str, list[bytes]]]:
    """As Watch streams bring them: key objects of their own, chains of different stores in turn, each from its start."""
    pending: list[list[tuple[str, list[bytes]]]] = []
    for chain in chains:
        for number, store in enumerate(rng.sample(range(NUM_STORES), 4)):
            held = chain if number < 1 else chain[: rng.randint(1, len(chain) - 1)]
            own = [bytes(bytearray(key)) for key in held]
            parts = [(f"10.0.0.{store}:50051", own[at : at + CHANGE_BLOCKS]) for at in range(0, len(own), CHANGE_BLOCKS)]
            pending.append(parts[::-1])
    mixed: list[tuple[str, list[bytes]]] = []
    while pending:
        number = rng.randrange(len(pending))
        mixed.append(pending[number].pop())
        if not pending[number]:
            pending[number] = pending[-1]
            pending.pop()
    return mixed


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In µs."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_us": cuts[49] * 1e6, "p99_us": cuts[98] * 1e6, "max_us": max(seconds) * 1e6}


def timed(call: Callable[[Any], object], inputs: Sequence[Any]) -> dict[str, Any]:
    """Of the clock, and of this thread's own time on the processor: they differ by what others on the machine took."""
    wall: list[float] = []
    own: list[float] = []
    for one in inputs:
        begun, begun_own = time.perf_counter(), time.thread_time()
        call(one)
        own.append(time.thread_time() - begun_own)
        wall.append(time.perf_counter() - begun)
    return {"wall": percentiles(wall), "thread": percentiles(own)}


def fresh(keys: Sequence[bytes]) -> list[bytes]:
    """The same keys as other objects, as a hash function makes them: nothing of them is in a cache."""
    return [bytes(bytearray(key)) for key in keys]


def measure_look_up(index: PrefixIndex, chains: list[list[bytes]], rounds: int, rng: random.Random) -> dict[str, Any]:
    length = len(chains[0])
    prompts = {
        "held to the end": lambda chain: chain,
        "held to the middle": lambda chain: [*chain[: length // 2], *(rng.randbytes(16) for _ in range(length - length // 2))],
        "unknown": lambda chain: [rng.randbytes(16) for _ in range(length)],
    }
    found: dict[str, Any] = {}
    for name, make in prompts.items():
        cold = [fresh(make(rng.choice(chains))) for _ in range(rounds)]
        found[f"look-up, {name}"] = timed(index.leading_runs, cold)
    again = fresh(chains[0])
    found["look-up, held to the end, the same prompt again and again"] = timed(index.leading_runs, [again] * rounds)
    for prompt in (fresh(chains[0]), fresh(chains[-1])):
        runs = index.leading_runs(prompt).values()
        assert len(runs) == 4 and max(runs) == length, "a wrong answer is not worth timing"
    return found


def run(block_size: int, rounds: int) -> dict[str, Any]:
    rng = random.Random(0)
    chains = documents(block_size, rng)
    messages = changes(chains, rng)
    num_copies = sum(len(keys) for _, keys in messages)
    index = PrefixIndex()
    gc.collect()
    begun = time.thread_time()
    for store, keys in messages:
        index.change(store, keys, ())
    seconds = time.thread_time() - begun
    found: dict[str, Any] = {
        "block_size": block_size,
        "keys": len(chains[0]),
        "blocks": len(index),
        "copies": num_copies,
        "copies_learned_per_s": num_copies / seconds,
    }
    found["look_up"] = measure_look_up(index, chains, rounds, rng)
    tokens = [[rng.randrange(128_000) for _ in range(NUM_TOKENS)] for _ in range(max(5, rounds // 40))]
    root = root_key(b"benchmark")
    found["hash"] = timed(lambda ids: block_keys(root, ids, block_size), tokens)
    prompts = [block_keys(root, ids, block_size) for ids in tokens]
    store = messages[0][0]
    found["expect"] = timed(lambda keys: index.expect(store, keys), prompts)
    found["look_up"]["look-up, promised to its end"] = timed(index.leading_runs, prompts)
    found["drop"] = timed(index.drop, [f"10.0.0.{number}:50051" for number in range(NUM_STORES)])
    return found


def bytes_a_block(block_size: int) -> dict[str, float]:
    """What Python allocates for the table, keys included; per block, with one holder each and with six."""
    rng = random.Random(0)
    chains = documents(block_size, rng)[: 1 + 200_000 * block_size // NUM_TOKENS]
    found: dict[str, float] = {}
    for num_holders in (1, 6):
        index = PrefixIndex()
        gc.collect()
        tracemalloc.start()
        for chain in chains:
            for store in rng.sample(range(NUM_STORES), num_holders):
                for at in range(0, len(chain), CHANGE_BLOCKS):
                    index.change(f"10.0.0.{store}:50051", fresh(chain[at : at + CHANGE_BLOCKS]), ())
        gc.collect()
        found[f"{num_holders} holders"] = tracemalloc.get_traced_memory()[0] / len(index)
        tracemalloc.stop()
    return found


def environment() -> dict[str, str]:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "commit": commit,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="halfmoon bench prefix_index")
    parser.add_argument("--rounds", type=int, default=400, help="look-ups of each kind")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    results = [run(block_size, arguments.rounds) for block_size in BLOCK_SIZES]
    memory = bytes_a_block(16)
    columns = ("block size, keys", "what", "wall p50, µs", "p99", "thread p50, µs", "p99")
    table = Table(*columns, title=f"{NUM_TOKENS} tokens, {NUM_BLOCKS} blocks, {NUM_STORES} stores")
    for found in results:
        rows = {**found["look_up"], **{name: found[name] for name in ("hash", "expect", "drop")}}
        for number, (name, times) in enumerate(rows.items()):
            label = f"{found['block_size']}, {found['keys']}" if number == 0 else ""
            cells = [times[kind][share] for kind in ("wall", "thread") for share in ("p50_us", "p99_us")]
            table.add_row(label, name, *(f"{cell:.0f}" for cell in cells))
    console = Console(width=110)
    console.print(table)
    for found in results:
        console.print(f"block size {found['block_size']}: {found['copies_learned_per_s'] / 1e6:.2f} M copies of blocks learned a second")
    console.print("bytes a block: " + ", ".join(f"{name}: {num_bytes:.0f}" for name, num_bytes in memory.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "results": results, "bytes_a_block": memory}, indent=2))


if __name__ == "__main__":
    main()
