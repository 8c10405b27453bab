"""Hit rates of the store's eviction policies over a trace: the store's own index and slots, one pool, no bytes, no time.

    halfmoon bench eviction --trace FILE [--blocks 1000,10000] [--policies lru,cost] [--from-start] [--out FILE.json]

request ─► longest leading run held (counts as hit) ─► all of its blocks are kept, as many as fit          blocks of the trace: 512 tokens
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from halfmoon.kvstore.content import ContentIndex
from halfmoon.kvstore.eviction import EVICTION_POLICIES, create_eviction_policy
from halfmoon.kvstore.slots import SlotAllocator
from halfmoon.simulator.trace import read_trace


def hit_rate(chains: Iterable[Sequence[int]], num_blocks: int, policy: str) -> float:
    """Of all blocks, those that were found."""
    slots = SlotAllocator(num_blocks)
    content = ContentIndex(slots, create_eviction_policy(policy), lambda stored, evicted: None)
    num_hits = num_asked = 0
    for chain in chains:
        keys = [block.to_bytes(8, "big") for block in chain]
        num_asked += len(keys)
        num_hits += len(content.find_run(keys))
        keep(content, slots, keys)
    return num_hits / num_asked


def hit_rate_from_start(chains: Iterable[Sequence[int]], num_blocks: int, policy: str) -> float:
    """As hit_rate, by the policy alone: a chain's blocks are added from its start, so that its start goes first."""
    blocks, held = create_eviction_policy(policy), set[int]()
    num_hits = num_asked = 0
    for chain in chains:
        num_asked += len(chain)
        num_hits += next((index for index, block in enumerate(chain) if block not in held), len(chain))
        for position, block in enumerate(chain):
            blocks.add(block, position, len(chain))
            held.add(block)
            if len(held) > num_blocks:
                held.remove(cast(int, blocks.evict()))
    return num_hits / num_asked


def keep(content: ContentIndex, slots: SlotAllocator, keys: Sequence[bytes]) -> None:
    """As much of the chain as fits, from its start."""
    held = {key: slot for key in keys if (slot := content.slot(key)) is not None}
    content.pin(held.values())  # lest room for the chain is made by evicting it
    missing = [key for key in keys if key not in held][: slots.num_free + slots.num_cached]
    fresh = dict(zip(missing, content.allocate(len(missing)) or [], strict=True))
    content.add((key, slot, 0) for key, slot in fresh.items())
    places = {**held, **fresh}
    content.unpin([places[key] for key in keys if key in places])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--blocks", default="1000,10000,30000,50000,100000")
    parser.add_argument("--policies", default=",".join(EVICTION_POLICIES))
    parser.add_argument("--from-start", action="store_true", help="add a chain from its start, unlike the store")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chains = [request.block_ids for request in read_trace(options.trace).requests]
    sizes, rows = [int(size) for size in options.blocks.split(",")], {}
    measure = hit_rate_from_start if options.from_start else hit_rate
    for policy in options.policies.split(","):
        rows[policy] = [measure(chains, size, policy) for size in sizes]
        sys.stdout.write(f"{policy:14s}" + " ".join(f"{100 * rate:6.1f}" for rate in rows[policy]) + "\n")
    if options.out:
        options.out.write_text(json.dumps({"trace": options.trace.name, "blocks": sizes, "hit_rates": rows}, indent=1))


if __name__ == "__main__":
    main()
