"""Microseconds of the thread's own time a placement takes: prefix look-up, policy, forecast. `halfmoon bench placement`"""

from __future__ import annotations

import random
import time

from rich.console import Console
from rich.table import Table

from halfmoon.proxy.conductor.conductor import Conductor
from halfmoon.proxy.conductor.placement import MemberState, PlacementRequest, Slo, Snapshot
from halfmoon.proxy.conductor.policies import create_policy
from halfmoon.proxy.conductor.predictors import Predictors
from halfmoon.proxy.prefixes.index import PrefixIndex
from halfmoon.simulator.scenario import find_cost_model

NUM_PLACEMENTS = 300
NUM_BLOCKS = 24  # of 512 tokens: the conversation trace's mean prompt
POLICIES = ("least_loaded", "cache_aware", "kvcache_centric", "adaptive")


def member(number: int, role: str, rng: random.Random) -> MemberState:
    name = f"n{number:04d}"
    running = rng.randint(1, 40) if role == "decode" else 0
    return MemberState(
        name, f"{name}#1", name, rng.randint(0, 50_000), 1_370_000, rng.uniform(0.0, 5.0), running, running, running * 12_000, role
    )


def microseconds(policy: str, num_instances: int) -> tuple[float, float]:
    """(look-up of the prefix, placement)."""
    rng = random.Random(0)
    prefill = tuple(member(number, "prefill", rng) for number in range(num_instances // 2))
    decode = tuple(member(number, "decode", rng) for number in range(num_instances // 2, num_instances))
    pools = (prefill + decode,) * 2 if policy == "adaptive" else (prefill, decode)
    snapshot = Snapshot.of(*pools, 512)
    index = PrefixIndex()
    chains = [[rng.randbytes(16) for _ in range(NUM_BLOCKS)] for _ in range(NUM_PLACEMENTS)]
    for one in prefill:  # all hold the first block, each some of the chains
        index.change(one.store_address, [chains[0][0]], ())
    for chain in chains:
        chain[0] = chains[0][0]
        for one in rng.sample(prefill, min(3, len(prefill))):
            index.change(one.store_address, chain[: rng.randint(1, NUM_BLOCKS)], ())
    predictors = Predictors(find_cost_model("a800-70b"))
    conductor = Conductor(create_policy(policy, rng, predictors, slo=Slo(30.0, 0.1)), None, predictors)
    begun = time.thread_time()
    runs = [index.leading_runs(chain) for chain in chains]
    looked = time.thread_time()
    for run in runs:
        conductor.place(PlacementRequest(NUM_BLOCKS * 512 + 100, run), snapshot)
    ended = time.thread_time()
    return (looked - begun) / NUM_PLACEMENTS * 1e6, (ended - looked) / NUM_PLACEMENTS * 1e6


def main() -> None:
    table = Table("instances", "look-up", *POLICIES, title="µs a placement")
    for num_instances in (16, 64, 256, 1024):
        found = [microseconds(policy, num_instances) for policy in POLICIES]
        table.add_row(str(num_instances), f"{min(pair[0] for pair in found):.0f}", *(f"{pair[1]:.0f}" for pair in found))
    Console().print(table)


if __name__ == "__main__":
    main()
