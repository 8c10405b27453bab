"""Keeps the prefix index up to date by a Watch stream to every store, from its Join to its end.

store joins ─► Watch ─► snapshot ─► changes 1, 2, 3 ...                 store leaves, or a new process replaces it ─► forgotten
                 ▲                      └─ a gap, a lost stream ─┐
                 └── what was known stands until the snapshot ───┘
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc.aio

from ...protocol.tasks import Tasks
from ...protocol.v1 import kvstore_pb2
from ..members.cluster import Cluster
from ..members.member import Member
from .index import PrefixIndex

logger = logging.getLogger(__name__)

RESUBSCRIBE_INTERVAL_S = 0.2
RESTART_INTERVAL_S = 5.0  # after an unexpected error while following a store


class PrefixWatch:
    def __init__(self, cluster: Cluster, index: PrefixIndex) -> None:
        self._index = index
        self._cluster = cluster
        self._tasks = Tasks("prefix watch")
        self._following: dict[Member, asyncio.Task[None]] = {}
        cluster.on_join(self._joined)

    async def close(self) -> None:
        await self._tasks.close()

    def _joined(self, member: Member) -> None:
        if member.role == "store":
            self._start(member)
            member.on_gone(self._left)

    def _start(self, store: Member, delay_s: float = 0.0) -> None:
        self._following[store] = self._tasks.spawn(self._follow(store, delay_s), f"following {store.title}", lambda _: self._broke(store))

    def _broke(self, store: Member) -> None:
        """What is known of the store may be wrong. Forgets it, and reads it anew after a while."""
        if not store.gone:
            self._index.drop(store.address)
            self._start(store, RESTART_INTERVAL_S)

    def _left(self, member: Member) -> None:
        self._following.pop(member).cancel()
        if self._cluster.store_at(member.address) is None:  # else a new store has this address, and its own snapshot
            self._index.drop(member.address)

    async def _follow(self, store: Member, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while not store.gone:
            try:
                if await self._watch(store):
                    continue
                logger.warning("%s ended its Watch stream; subscribing again", store.title)
            except grpc.aio.AioRpcError as error:
                logger.warning("%s: Watch failed (%s: %s); subscribing again", store.title, error.code().name, error.details())
            await asyncio.sleep(RESUBSCRIBE_INTERVAL_S)

    async def _watch(self, store: Member) -> bool:
        """Returns True if the whole content must be read again at once, False at the end of the stream."""
        sequence: int | None = None
        call = store.store.Watch(kvstore_pb2.WatchRequest())
        try:
            async for reply in call:
                if reply.snapshot:
                    await self._read_all(store, reply.stored, reply.demoted)
                elif sequence is None or reply.sequence != sequence + 1:
                    logger.warning("%s: change %d does not follow %s; reading all of it again", store.title, reply.sequence, sequence)
                    return True
                else:
                    self._index.change(store.address, reply.stored, reply.evicted, reply.demoted, reply.promoted)
                    if self._index.is_cut(store.address) and self._index.has_room():
                        return True
                sequence = reply.sequence
        finally:
            call.cancel()
        return False

    async def _read_all(self, store: Member, keys: Sequence[bytes], on_ssd: Sequence[bytes]) -> None:
        for _ in self._index.replace_in_parts(store.address, keys, on_ssd):
            await asyncio.sleep(0)  # serves others
        if self._index.is_cut(store.address):
            logger.warning("%s holds more than the prefix index has room for; what is left out counts as absent", store.title)
