"""A client's session at its node's store, attached again whenever the store comes back.

attach ─► attached ──lost──► attaching, with backoff ──► attached ─► …
             client: the live one            client: StoreUnavailable, at once
             attached(): the live one        attached() waits, and lets the next try come soon
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from ..protocol.errors import StoreUnavailable
from .access import StoreAccess
from .client import StoreClient

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 2.0


class StoreLink:
    """Owned by the event loop.

    Args:
        on_attached: awaited before attach() returns a new session.
        on_lost: told that a session is over, before anything else happens.
    """

    def __init__(
        self,
        address: str,
        access: StoreAccess,
        *,
        on_lost: Callable[[StoreClient], None],
        on_attached: Callable[[StoreClient], Awaitable[None]] | None = None,
    ) -> None:
        self.address = address
        self._access = access
        self._on_lost = on_lost
        self._on_attached = on_attached
        self._client: StoreClient | None = None
        self._waiting: set[asyncio.Future[StoreClient]] = set()  # for a session
        self._wanted = asyncio.Event()  # somebody waits who did not when the last attempt failed

    @property
    def is_attached(self) -> bool:
        return self._client is not None and not self._client.lost.is_set()

    @property
    def client(self) -> StoreClient:
        """Raises StoreUnavailable where there is no session now."""
        if self._client is None or not self.is_attached:
            raise StoreUnavailable(f"the KV store at {self.address} is gone; attaching again as soon as it is back", address=self.address)
        return self._client

    async def attached(self) -> StoreClient:
        """The session, as soon as there is one: for who knows that the store is there. The caller bounds the wait."""
        if self.is_attached:
            return self.client
        waiter: asyncio.Future[StoreClient] = asyncio.get_running_loop().create_future()
        if not self._waiting:
            self._wanted.set()
        self._waiting.add(waiter)
        try:
            return await waiter
        finally:
            self._waiting.discard(waiter)

    async def attach(self) -> StoreClient:
        """Raises StoreUnavailable, SchemaMismatch."""
        client = await self._access.attach(self.address)
        self._client = client
        if self._on_attached is not None:
            await self._on_attached(client)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(client)
        logger.info("%s attached to the KV store at %s over %s", self._access.client_id, self.address, client.transport)
        return client

    async def stay_attached(self) -> None:
        """Until cancelled. Raises SchemaMismatch where a store of another format took the place."""
        while True:
            client = self._client or await self._attach_again()
            await client.lost.wait()
            logger.warning("%s lost the KV store at %s", self._access.client_id, self.address)
            self._on_lost(client)
            await client.close()  # cancelled in here, it is still ours, and close() closes it
            self._client = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _attach_again(self) -> StoreClient:
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                return await self.attach()
            except StoreUnavailable as error:
                logger.debug("%s: %s; trying again in %.1f s", self._access.client_id, error, backoff_s)
            self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), backoff_s)
            backoff_s = FIRST_BACKOFF_S if self._waiting else min(2 * backoff_s, LAST_BACKOFF_S)
