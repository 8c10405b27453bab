"""Asks stores to read blocks from SSD into DRAM, beside the workers' own loads.

ahead   a prompt has to wait for pages of its worker, and so would the load of its prefix, which is worth it: the store begins now
probe   a store's blocks are computed because its SSD is slow: now and then it reads a few that nobody waits for, and the predictor learns
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import grpc.aio
from prometheus_client import CollectorRegistry

from ...protocol import metrics as specs
from ...protocol.exporter import counter
from ...protocol.grpc_errors import from_rpc_error
from ...protocol.tasks import Tasks
from ...protocol.v1 import kvstore_pb2
from ..conductor.placement import Placement, PlacementRequest
from ..members.cluster import Cluster

logger = logging.getLogger(__name__)

PROBE_S = 10.0  # between two probes of a store
PROBE_BLOCKS = 8  # of one probe; once a disk has recovered, three of them show it
DEADLINE_S = 60.0
Cause = Literal["ahead", "probe"]


class ReadLearner(Protocol):
    def read_from_ssd(self, store: str, num_bytes: int, seconds: float) -> None: ...


class Promoter:
    """On the event loop."""

    def __init__(
        self, cluster: Cluster, learner: ReadLearner, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._learner = learner
        self._clock = clock
        self._tasks = Tasks("promoter")
        self._next_probe_s: dict[str, float] = {}  # by store address
        self._prefixes = counter(specs.SSD_PREFIXES, registry)
        self._promotions = counter(specs.SSD_PROMOTIONS, registry)

    async def close(self) -> None:
        await self._tasks.close()

    def placed(self, asked: PlacementRequest, placement: Placement, keys: Sequence[bytes]) -> None:
        """asked: weighed. keys: of the prompt."""
        for store, verdict in placement.ssd_verdicts.items():
            self._prefixes.labels("load" if verdict.loads else "leave").inc()
            num_held = asked.held_blocks.get(store, 0)
            if not verdict.loads:
                self._probe(store, keys[: num_held + min(verdict.num_blocks, PROBE_BLOCKS)])
            elif _waits_for_pages(asked, placement):
                self._start(store, keys[:num_held], "ahead")

    def _probe(self, store: str, keys: Sequence[bytes]) -> None:
        now_s = self._clock()
        if now_s >= self._next_probe_s.get(store, 0.0):
            self._next_probe_s = {other: at_s for other, at_s in self._next_probe_s.items() if at_s > now_s}
            self._next_probe_s[store] = now_s + PROBE_S
            self._start(store, keys, "probe")

    def _start(self, address: str, keys: Sequence[bytes], cause: Cause) -> None:
        self._promotions.labels(cause).inc()
        self._tasks.spawn(self._promote(address, keys), f"having {len(keys)} blocks read from SSD by the store at {address}")

    async def _promote(self, address: str, keys: Sequence[bytes]) -> None:
        store, schema = self._cluster.store_at(address), self._cluster.schema
        if store is None or schema is None:
            return
        try:
            reply = await store.store.Promote(kvstore_pb2.PromoteRequest(block_keys=keys), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            logger.warning("reading ahead from SSD failed: %s", from_rpc_error(error, store.title).message)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            logger.info("%s left while it read from SSD", store.title)  # closing its channel cancelled the call
        else:
            if reply.num_blocks:
                self._learner.read_from_ssd(address, reply.num_blocks * schema.block_bytes, reply.wait_s)


def _waits_for_pages(asked: PlacementRequest, placement: Placement) -> bool:
    """Else the worker begins the load at once."""
    capacity = placement.prefill.kv_capacity_tokens
    return 0 < capacity < placement.prefill.num_outstanding_tokens + asked.num_tokens
