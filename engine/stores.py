"""The stores that a worker talks to: its node's own, for good, and others from their first use on.

own        ─ StoreLink, attached again when lost
the others ─ a hand-off's store or a prefix's, attached on demand and kept until lost
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from ..kvstore.access import StoreAccess
from ..kvstore.client import StoreClient
from ..kvstore.store_link import StoreLink
from ..protocol.tasks import Tasks

logger = logging.getLogger(__name__)


class Stores:
    """Owned by the event loop. Arguments as StoreLink's; address is the own store's."""

    def __init__(
        self,
        address: str,
        access: StoreAccess,
        *,
        on_lost: Callable[[StoreClient], None],
        on_attached: Callable[[StoreClient], Awaitable[None]],
    ) -> None:
        self.own = StoreLink(address, access, on_lost=on_lost, on_attached=on_attached)
        self._access = access
        self._on_lost = on_lost
        self._on_attached = on_attached
        self._sessions: dict[str, asyncio.Task[StoreClient]] = {}
        self._open: set[StoreClient] = set()  # closed in close() where a task was cancelled before it had done so
        self._tasks = Tasks(access.client_id)

    def is_own(self, address: str) -> bool:
        return address in ("", self.own.address)

    async def attached(self, address: str) -> StoreClient:
        """As client, for a hand-off that the proxy has decided: it knows the own store to be there, so a lost session is waited for."""
        return await self.own.attached() if self.is_own(address) else await self.client(address)

    async def client(self, address: str) -> StoreClient:
        """A live session at the store. Raises StoreUnavailable, SchemaMismatch."""
        if self.is_own(address):
            return self.own.client
        session = self._sessions.get(address)
        if session is None:
            session = self._sessions[address] = self._tasks.start(self._attach(address))
            session.add_done_callback(partial(self._attached, address))
        return await asyncio.shield(session)

    async def close(self) -> None:
        await self._tasks.close()
        self._sessions.clear()
        for client in list(self._open):
            await self._close(client)
        await self.own.close()

    async def _attach(self, address: str) -> StoreClient:
        client = await self._access.attach(address)
        self._open.add(client)
        try:
            await self._on_attached(client)
        except BaseException:
            await self._close(client)
            raise
        self._tasks.spawn(self._watch(address, client), f"waiting for the end of the store at {address}")
        return client

    def _attached(self, address: str, session: asyncio.Task[StoreClient]) -> None:
        if session.cancelled() or session.exception() is not None:
            self._sessions.pop(address, None)  # the next call tries again

    async def _watch(self, address: str, client: StoreClient) -> None:
        await client.lost.wait()
        logger.warning("%s lost the KV store at %s", self._access.client_id, address)
        self._sessions.pop(address, None)
        self._on_lost(client)
        await self._close(client)

    async def _close(self, client: StoreClient) -> None:
        await client.close()  # cancelled in here, it is still ours
        self._open.discard(client)
