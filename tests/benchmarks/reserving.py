"""What one hand-over of freed room costs while many Reserves wait for it: wake-ups, and the event loop's own time.

python tests/benchmarks/reserving.py
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from halfmoon.kvstore.arena import Arena
from halfmoon.kvstore.reserve_queue import ReserveQueue
from halfmoon.kvstore.store import Store
from halfmoon.kvstore.waiters import Waiters
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, kvstore_pb2

SCHEMA = KVSchema(model_fingerprint="f" * 16, dtype="float32", num_layers=1, num_kv_heads=1, head_dim=4, block_size=4)
NUM_HANDOVERS = 20


class Cost(NamedTuple):
    """Of one hand-over."""

    num_wakeups: float
    cpu_ms: float


class CountingWaiters(Waiters):
    num_wakeups = 0

    async def wait(self, key: object, deadline: float) -> bool:
        woken = await super().wait(key, deadline)
        self.num_wakeups += 1
        return woken


def reserve_request(session_id: str, number: int, num_blocks: int = 1, deadline_s: float = 600.0) -> kvstore_pb2.ReserveRequest:
    return kvstore_pb2.ReserveRequest(
        session_id=session_id,
        purpose=kvstore_pb2.ReserveRequest.PURPOSE_HANDOFF,
        handoff=common_pb2.HandoffId(id=f"r{number}", epoch=1),
        num_blocks=num_blocks,
        deadline_s=deadline_s,
    )


async def handover_cost(num_waiters: int, folder: Path) -> Cost:
    """A store of one slot: each release hands it to the next of num_waiters."""
    arena = Arena(SCHEMA.block_bytes, folder)
    try:
        store = Store(StoreConfig(lease_ttl_s=600), arena, store_id="store", node_id="node")
        waiters = store._waiters = CountingWaiters()
        store._reserving = ReserveQueue(waiters.notify)
        session, _ = store.attach(kvstore_pb2.AttachRequest.Hello(client_id="prefill-0", schema=SCHEMA.to_proto()))
        lease = await store.reserve(reserve_request(session.session_id, 0))
        waiting = [asyncio.ensure_future(store.reserve(reserve_request(session.session_id, 1 + n))) for n in range(num_waiters)]
        await asyncio.sleep(0)
        began = time.thread_time()
        for number in range(NUM_HANDOVERS):
            store.release(lease.lease_id)
            lease = await waiting[number]
        cost = Cost(waiters.num_wakeups / NUM_HANDOVERS, (time.thread_time() - began) / NUM_HANDOVERS * 1e3)
        await store.drain(0)
        await asyncio.gather(*waiting, return_exceptions=True)
        return cost
    finally:
        arena.close()


def main() -> None:
    table = Table("waiting", "wake-ups", "ms of CPU", title="one hand-over of freed room")
    with tempfile.TemporaryDirectory() as folder:
        for num_waiters in (50, 500, 5000):
            cost = asyncio.run(handover_cost(num_waiters, Path(folder)))
            table.add_row(str(num_waiters), f"{cost.num_wakeups:.1f}", f"{cost.cpu_ms:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
