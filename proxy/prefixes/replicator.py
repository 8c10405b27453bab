"""Copies hot prefixes to more stores ahead of demand, by the stores' Replicate call.

placed ─► HotPrefixes ─► next_copy ─► budget? room in flight? ─► Replicate at the target store ─► its Watch tells the prefix index

A prefix that a placement itself moves (Algorithm 1: best / own over the threshold) is not copied here. The prefill worker loads it
from the store that the placement names, and caches it in its own node's store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import grpc.aio
from prometheus_client import CollectorRegistry

from ...protocol import metrics as specs
from ...protocol.blocks import div_ceil
from ...protocol.exporter import counter, gauge
from ...protocol.grpc_errors import from_rpc_error
from ...protocol.tasks import Tasks
from ...protocol.v1 import kvstore_pb2
from ..members.cluster import Cluster
from .hot import MIN_TOKENS, Budget, Copy, HotPrefixes, next_copy
from .index import PrefixIndex

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 4
BYTES_PER_S = 500e6
DEADLINE_S = 30.0  # of one copy
RETRY_AFTER_S = 30.0  # before a copy that failed or was cut short is tried on the same store again


class Replicator:
    """Lives on the event loop. With replicate "never", placed() does nothing."""

    def __init__(
        self,
        cluster: Cluster,
        index: PrefixIndex,
        registry: CollectorRegistry,
        *,
        replicate: Literal["never", "hot"],
        clock: Callable[[], float] = time.monotonic,
        prefixes: HotPrefixes | None = None,
        bytes_per_s: float = BYTES_PER_S,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._cluster = cluster
        self._index = index
        self._enabled = replicate == "hot"
        self._clock = clock
        self._prefixes = prefixes or HotPrefixes()
        self._budget = Budget(bytes_per_s)
        self._max_in_flight = max_in_flight
        self._tasks = Tasks("replicator")
        self._under_way: list[Copy] = []
        self._retry_at: dict[tuple[str, bytes], float] = {}  # (target, last key) -> when
        self._replications = counter(specs.REPLICATIONS, registry)
        self._bytes = counter(specs.REPLICATION_BYTES, registry)
        gauge(specs.REPLICATIONS_IN_FLIGHT, registry).set_function(lambda: len(self._under_way))

    def placed(self, keys: Sequence[bytes]) -> None:
        """A request with these block keys was placed. Cheap: copies run in the background."""
        schema = self._cluster.schema
        if not self._enabled or schema is None:
            return
        now_s = self._clock()
        hot = self._prefixes.hit(keys, div_ceil(MIN_TOKENS, schema.block_size), now_s)
        if hot is None:
            return
        run, num_copies = keys[: hot.num_blocks], self._prefixes.num_copies(hot)
        if not self._wants_copy(run, num_copies):
            return
        if len(self._under_way) >= self._max_in_flight:
            self._replications.labels("too_many").inc()
        elif not self._budget.has_left(now_s):
            self._replications.labels("over_budget").inc()
        elif (copy := self._next_copy(run, num_copies, now_s)) is not None:
            self._budget.take(len(run) * schema.block_bytes)
            self._under_way.append(copy)
            title = f"copying {len(run)} hot blocks to {copy.target}"
            self._tasks.spawn(self._copy(copy, hot.num_hits), title, lambda _: self._ended(copy, "internal"))

    def _wants_copy(self, run: Sequence[bytes], num_copies: int) -> bool:
        """Whether a look at all stores may find one that is to take a copy. Of a hot prefix that is everywhere already it would not."""
        stores, last = self._cluster.prefill_stores, run[-1]
        num_coming = sum(_overlap(copy.keys, run) for copy in self._under_way)
        return self._index.is_held(last) and self._index.num_held(last, stores) + num_coming < min(num_copies, len(stores))

    async def close(self) -> None:
        await self._tasks.close()

    def _next_copy(self, run: Sequence[bytes], num_copies: int, now_s: float) -> Copy | None:
        last, under_way = run[-1], self._under_way
        same = {copy.target for copy in under_way if _overlap(copy.keys, run)}
        if self._retry_at:
            self._retry_at = {pair: at for pair, at in self._retry_at.items() if at > now_s}
        return next_copy(
            run,
            num_copies,
            holders=self._cluster.store_addresses & set(self._index.holders(last)),
            coming={*self._index.promised(last), *same},
            load_of=self._cluster.store_loads(),
            copies_from=Counter(copy.source for copy in under_way),
            avoid={target for target, key in self._retry_at if key == last},
        )

    async def _copy(self, copy: Copy, num_hits: float) -> None:
        logger.info("copying %d hot blocks (%.0f hits) from %s to %s", len(copy.keys), num_hits, copy.source, copy.target)
        outcome = "store_unavailable"
        try:
            store = self._cluster.store_at(copy.target)
            if store is not None:
                request = kvstore_pb2.ReplicateRequest(block_keys=copy.keys, source_address=copy.source, deadline_s=DEADLINE_S)
                num_bytes = 0
                async for reply in store.store.Replicate(request, timeout=DEADLINE_S + 1):
                    self._bytes.inc(reply.num_bytes - num_bytes)
                    num_bytes = reply.num_bytes
                    outcome = "copied" if reply.num_held == len(copy.keys) else "cut_short"  # of the last one
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, f"store {copy.target}")
            outcome = failure.code
            logger.warning("copying %d hot blocks to %s failed: %s", len(copy.keys), copy.target, failure.message)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            logger.info("%s left while blocks were copied to it", copy.target)  # closing its channel cancelled the call
        self._ended(copy, outcome)

    def _ended(self, copy: Copy, outcome: str) -> None:
        self._under_way.remove(copy)
        if outcome != "copied":
            self._retry_at[copy.target, copy.keys[-1]] = self._clock() + RETRY_AFTER_S
        self._replications.labels(outcome).inc()


def _overlap(run: Sequence[bytes], other: Sequence[bytes]) -> bool:
    """True if one is the start of the other. Equal keys mean equal chains up to them."""
    num_blocks = min(len(run), len(other))
    return run[num_blocks - 1] == other[num_blocks - 1]
