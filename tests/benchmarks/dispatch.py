"""Microseconds a request costs the live proxy from tokens to an assigned pair, and back: hash, look up, place, assign, remember, release.

`halfmoon bench dispatch`: no process but this one; members that never answer. The thread's own time.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.config import ProxyConfig
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.members.cluster import Cluster
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.request import ProxyRequest
from halfmoon.proxy.requests.pair import Pair
from halfmoon.proxy.requests.router import Router

SCHEMA = KVSchema(model_fingerprint="bench", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=64)
ROLES = {"store": control_pb2.ROLE_STORE, "prefill": control_pb2.ROLE_PREFILL, "decode": control_pb2.ROLE_DECODE}
NUM_REQUESTS = 300
NUM_TOKENS = 1536
NUM_QUEUED = 4  # prefills at every prefill worker
ROUNDS = 3
# no SLO is missed: what is timed is the asking
CONFIGS: dict[str, dict[str, Any]] = {
    "cache_aware": {"policy": "cache_aware"},
    "kvcache_centric": {"policy": "kvcache_centric"},
    "adaptive": {"policy": "adaptive"},
    "kvcache_centric, edf, predictive": {
        "policy": "kvcache_centric", "order": "edf", "admission": "predictive", "ttft_slo_s": 1e5, "tpot_slo_s": 1e5,
    },
}  # fmt: skip


def join(cluster: Cluster, num_nodes: int) -> list[str]:
    """A store, a prefill and a decode worker on each node; the stores' addresses."""
    stores = [f"127.0.0.1:{20_000 + node}" for node in range(num_nodes)]
    for node, store in enumerate(stores):
        for number, (role, value) in enumerate(ROLES.items()):
            info = control_pb2.MemberInfo(
                id=f"{role}-{node}",
                incarnation=f"{role}-{node}.1",
                role=value,
                address=store if role == "store" else f"127.0.0.1:{30_000 + 3 * node + number}",
                store_address=store,
                schema=None if role == "store" else SCHEMA.to_proto(),
                max_model_len=10**5,
                kv_capacity_tokens=10**7,
            )
            cluster.join(info, control_pb2.MemberLoad())
    return stores


async def microseconds(num_workers: int, config: dict[str, Any]) -> tuple[float, float]:
    """(hashing alone, placement and release)."""
    cluster = Cluster(ProxyMetrics(CollectorRegistry()), SCHEMA)
    router = Router(ProxyConfig(**config), cluster, cluster._metrics, eos_token_ids=frozenset())
    stores = join(cluster, num_workers // 2)
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(NUM_TOKENS)] for _ in range(NUM_REQUESTS)]
    root = root_key(SCHEMA.fingerprint)
    for prompt in prompts:
        keys = block_keys(root, prompt, SCHEMA.block_size)
        for store in rng.sample(stores, min(3, len(stores))):
            router._index.change(store, keys[: rng.randint(1, len(keys))], ())
    params = SamplingParams(max_tokens=5, seed=1)
    requests = [ProxyRequest(f"r{number}", prompt, params, 60.0) for number, prompt in enumerate(prompts)]

    def place(request: ProxyRequest) -> Pair:
        prompt = router._prompts.encode(request.token_ids)
        return router._dispatcher.place(request, prompt, router.decisions.open(request, router._slo_of(request)))

    queued = [place(request) for request in requests[: NUM_QUEUED * len(stores)]]
    hashed, placed = [], []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for prompt in prompts:
            block_keys(root, prompt, SCHEMA.block_size)
        middle = time.thread_time()
        for request in requests:
            place(request).release()
        hashed.append(middle - began)
        placed.append(time.thread_time() - middle)
    for pair in queued:
        pair.release()
    await router.close()
    await cluster.close()
    return min(hashed) / NUM_REQUESTS * 1e6, min(placed) / NUM_REQUESTS * 1e6


def main() -> None:
    table = Table("workers", "hashing", *CONFIGS, title="µs a request")
    for num_workers in (4, 64):
        found = [asyncio.run(microseconds(num_workers, config)) for config in CONFIGS.values()]
        table.add_row(str(num_workers), f"{min(pair[0] for pair in found):.0f}", *(f"{pair[1]:.0f}" for pair in found))
    Console().print(table)


if __name__ == "__main__":
    main()
