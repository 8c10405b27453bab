"""Policies on a recorded trace: mean TTFT, what came from caches, and prefill work. Simulated: one line a policy.

halfmoon bench routing --trace conversation_trace.jsonl.xz --form 2p2d
Fewer than the trace's 16 instances get as large a share of its sessions.
`random`, `least_loaded` and the local `cache_aware` fetch no prefix from another node; `kvcache_centric` (Mooncake's Algorithm 1) does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prefill_order import scenario_of

from halfmoon.simulator.cluster import simulate
from halfmoon.simulator.outcome import Result
from halfmoon.simulator.replay import ReplayOptions, replay
from halfmoon.simulator.trace import ideal_hits, read_trace

FULL_SIZE = 16  # instances that a recorded trace is for
POLICIES = ("random", "least_loaded", "cache_aware", "kvcache_centric")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--form", default="2p2d")
    parser.add_argument("--cost-model", default="a800-70b")
    parser.add_argument("--order", default="fcfs")
    args = parser.parse_args()
    base = scenario_of(args.form, args.cost_model, order=args.order).with_(one_node=False)
    requests = replay(read_trace(args.trace), ReplayOptions(sample=min(base.num_instances / FULL_SIZE, 1.0)))
    print("| policy | TTFT mean s | to the last's | prompt tokens from caches | prefill s a request |\n|---|---|---|---|---|")
    found = {name: Result(simulate(base.with_(policy=name, remote_prefix=name == POLICIES[-1]), requests)) for name in POLICIES}
    last_s = found[POLICIES[-1]].quantiles("ttft_s").mean
    for name, one in found.items():
        mean_s = one.quantiles("ttft_s").mean
        cells = f"{mean_s:.2f} | {mean_s / last_s:.2f} | {one.hit_tokens_ratio:.1%} | {one.prefill_s_per_request:.3f}"
        print(f"| {name} | {cells} |", flush=True)
    print(f"| ceiling | - | - | {ideal_hits(requests.requests).tokens_ratio:.1%} | - |")


if __name__ == "__main__":
    main()
