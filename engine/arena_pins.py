"""Keeps the arenas of the stores that a worker is attached to pinned, from attach to loss.

attached ─► pinned, in a thread ─► copies go straight into the arena and out of it ─► lost: what is under way lands ─► unpinned
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Protocol

import numpy as np

from .kv_cache import PagedKVCache
from .transfer import TransferThread


class Arena(Protocol):
    memory: np.ndarray


class StoreSession(Protocol):
    @property
    def arena(self) -> Arena | None:
        """None where the store's memory is not shared."""
        ...


class ArenaPins:
    """On the event loop."""

    def __init__(self, cache: PagedKVCache, transfer: TransferThread) -> None:
        self._pinned = cache.pinned
        self._transfer = transfer

    async def attached(self, session: StoreSession) -> None:
        """Takes a while for a large arena. One that can't be pinned is used all the same, by way of buffers."""
        if session.arena is not None:
            await asyncio.to_thread(self._pinned.pin, session.arena.memory)

    def lost(self, session: StoreSession) -> None:
        """Before the session is closed: hand-offs that came before may still be copied out of its memory."""
        if session.arena is not None:
            self._transfer.submit(partial(self._pinned.release, session.arena.memory))

    async def close(self) -> None:
        """The transfer thread is closed."""
        await asyncio.to_thread(self._pinned.close)
