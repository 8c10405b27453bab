"""What one store holds, on DRAM and SSD together: look-ups over both, and what watchers are told of either.

content_changed (arena) ─┐
evicted (SSD) ───────────┴─► stored · evicted · demoted · promoted ─► WatchFeed
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..protocol.config import StoreConfig
from ..protocol.leading_run import NUM_EXACT, leading_run
from ..protocol.schema import KVSchema
from ..protocol.tasks import Tasks
from ..protocol.v1 import common_pb2
from .content import ContentIndex
from .eviction import create_eviction_policy
from .lease_manager import LeaseManager, check_keys
from .ssd_files import Record, SsdFiles
from .ssd_tier import Promotion, SsdTier
from .watch import WatchFeed

logger = logging.getLogger(__name__)


class Held(NamedTuple):
    """Leading blocks of a look-up."""

    num_blocks: int  # on any tier
    num_blocks_dram: int


class Tiers:
    """Belongs to the event loop. Empty until open."""

    def __init__(self, config: StoreConfig, on_moved: Callable[[str, int], None]) -> None:
        """on_moved: as SsdTier's."""
        self.feed = WatchFeed(self._keys, demoted=self._keys_on_ssd_alone)
        self._config = config
        self._on_moved = on_moved
        self._dram: ContentIndex | None = None
        self._ssd: SsdTier | None = None
        self._tasks = Tasks("the store's tiers")
        self._opening: asyncio.Task[None] | None = None

    @property
    def num_ssd_blocks(self) -> tuple[int, int]:
        """(places, used)."""
        return (0, 0) if self._ssd is None else (self._ssd.num_places, self._ssd.num_blocks)

    def open(self, schema: KVSchema, manager: LeaseManager, row: Callable[[int], np.ndarray]) -> None:
        """Begins to open the SSD, if there is one. row: as SsdTier's."""
        self._dram = manager.content
        if self._config.ssd_path:
            self._opening = self._tasks.start(self._open_ssd(schema, manager, row))

    async def opened(self) -> None:
        """What an earlier store left on the SSD is found by now. Raises ConfigError where the SSD can't be used."""
        if self._opening is not None:
            await asyncio.shield(self._opening)

    async def close(self) -> None:
        """Returns when no thread reads or writes the arena for the SSD any more."""
        if self._opening is not None:
            await asyncio.wait({self._opening})
        if self._ssd is not None:
            await self._ssd.close()

    def look(self) -> None:
        """Slots were taken."""
        if self._ssd is not None:
            self._ssd.look()

    async def promote(self, block_keys: Sequence[bytes], compute_s: float, use: common_pb2.SsdUse) -> Promotion:
        """Leading blocks come up from the SSD; as far as that is worth it, where the caller leaves that open. compute_s: of one block.

        Raises InvalidRequest.
        """
        ssd = self._ssd
        if ssd is None or use == common_pb2.SSD_USE_LEAVE:
            return Promotion()
        check_keys(block_keys)
        num_worth = len(block_keys) if use == common_pb2.SSD_USE_LOAD else ssd.num_worth(block_keys, compute_s)
        return await ssd.promote(block_keys[:num_worth], compute_s)

    def lookup(self, block_keys: Sequence[bytes], num_exact: int = NUM_EXACT) -> Held:
        """num_exact: as leading_run's."""
        if self._dram is None:
            return Held(0, 0)
        content, ssd = self._dram, self._ssd
        num_dram = leading_run(block_keys, content.holds, num_exact)
        if ssd is None:
            return Held(num_dram, num_dram)
        return Held(leading_run(block_keys, lambda key: content.holds(key) or ssd.holds(key), num_exact), num_dram)

    def content_changed(self, stored: list[bytes], evicted: list[bytes]) -> None:
        """Of the arena."""
        ssd = self._ssd
        if ssd is None:
            self.feed.publish(stored, evicted)
            return
        demoted, gone = [key for key in evicted if ssd.holds(key)], [key for key in evicted if not ssd.holds(key)]
        promoted, new = [key for key in stored if ssd.holds(key)], [key for key in stored if not ssd.holds(key)]
        self.feed.publish(new, gone, demoted, promoted)
        ssd.look()

    async def _open_ssd(self, schema: KVSchema, manager: LeaseManager, row: Callable[[int], np.ndarray]) -> None:
        config = self._config

        def open_files() -> tuple[SsdFiles, list[Record]]:
            files = SsdFiles(Path(config.ssd_path), config.ssd_bytes, schema.block_bytes, schema.fingerprint)
            return files, files.records()

        files, records = await asyncio.to_thread(open_files)
        policy = create_eviction_policy(config.eviction)
        evicted, moved, ratio = self._ssd_evicted, self._on_moved, config.ssd_free_ratio
        tier = SsdTier(files, policy, manager.content, manager.slots, row, free_ratio=ratio, on_evicted=evicted, on_moved=moved)
        tier.restore(records)
        self._ssd = tier
        found = self._keys_on_ssd_alone()
        if found:
            logger.info("%d blocks stand on the SSD from before", len(found))
            self.feed.publish(found, [], found)

    def _ssd_evicted(self, keys: list[bytes]) -> None:
        assert self._dram is not None
        gone = [key for key in keys if self._dram.slot(key) is None]
        if gone:
            self.feed.publish([], gone)

    def _keys(self) -> list[bytes]:
        return [*(self._dram.keys() if self._dram else []), *self._keys_on_ssd_alone()]

    def _keys_on_ssd_alone(self) -> list[bytes]:
        if self._ssd is None or self._dram is None:
            return []
        dram = self._dram
        return [key for key in self._ssd.keys() if dram.slot(key) is None]
