"""Keeps the prefix index true: one Watch stream to every store, from its Join to its end.

store joins ─► Watch ─► snapshot ─► changes 1, 2, 3 ...
                 ▲          └─ a gap, a lost stream: what the store holds is unknown, so forgotten ─┐
                 └──────────────────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging

import grpc.aio

from ..protocol.v1 import kvstore_pb2
from .cluster import Cluster
from .member import Member
from .prefix_index import PrefixIndex

logger = logging.getLogger(__name__)

RESUBSCRIBE_INTERVAL_S = 0.2


class PrefixWatch:
    def __init__(self, cluster: Cluster, index: PrefixIndex) -> None:
        self._index = index
        self._cluster = cluster
        self._tasks: dict[Member, asyncio.Task[None]] = {}
        cluster.on_join(self._joined)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _joined(self, member: Member) -> None:
        if member.role == "store":
            self._tasks[member] = asyncio.get_running_loop().create_task(self._follow(member))
            member.on_gone(self._left)

    def _left(self, member: Member) -> None:
        self._tasks.pop(member).cancel()
        if self._cluster.store_at(member.info.address) is None:  # else a new store has its address, and its own snapshot
            self._index.drop(member.info.address)

    async def _follow(self, store: Member) -> None:
        while not store.gone:
            try:
                await self._watch(store)
                logger.warning("%s ended its Watch stream or left a gap in it; subscribing again", store.title)
            except grpc.aio.AioRpcError as error:
                logger.warning("%s: Watch failed (%s: %s); subscribing again", store.title, error.code().name, error.details())
            self._index.drop(store.info.address)
            await asyncio.sleep(RESUBSCRIBE_INTERVAL_S)

    async def _watch(self, store: Member) -> None:
        """Returns at the stream's end or where a change is missing."""
        sequence: int | None = None
        call = store.store.Watch(kvstore_pb2.WatchRequest())
        try:
            async for reply in call:
                if reply.snapshot:
                    self._index.replace(store.info.address, reply.stored)
                elif sequence is None or reply.sequence != sequence + 1:
                    return
                else:
                    self._index.change(store.info.address, reply.stored, reply.evicted)
                sequence = reply.sequence
        finally:
            call.cancel()
