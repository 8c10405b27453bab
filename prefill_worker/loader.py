"""Loads the longest cached prefix of a prompt into its pages, so that it is not computed.

own store: the longest run of leading blocks ─┐
a store that the proxy names, if longer there ─┴─► slices ─► transfer thread ─► pages

Computing begins when every slice has arrived and every checksum matched, not layer by layer: what had been computed from a
block that turns out corrupt would have been pushed to the decode worker by then. Other prompts' chunks run meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ..engine.kv_cache import PagedKVCache
from ..engine.page_copy import load_pages
from ..engine.transfer import TransferThread
from ..kvstore.client import BlockReader, StoreClient
from ..protocol.errors import HalfmoonError, HandoffCorrupt
from .job import PrefillJob
from .metrics import PrefillMetrics
from .stores import Stores

logger = logging.getLogger(__name__)


class PrefixLoader:
    """On the event loop. spawn: runs a coroutine in the background until the worker stops."""

    def __init__(
        self,
        cache: PagedKVCache,
        stores: Stores,
        transfer: TransferThread,
        metrics: PrefillMetrics,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._cache = cache
        self._stores = stores
        self._transfer = transfer
        self._metrics = metrics
        self._spawn = spawn

    async def load(self, job: PrefillJob) -> None:
        """Sets the job's num_cached_tokens: less than all of its tokens, for the last one gives the first logits.

        Never fails: a prefix that is corrupt or gone is computed, with a warning and a count. What was corrupt is not in its
        store any more when this returns, and noted in the job: others may have been promised it meanwhile.
        """
        began = time.monotonic()
        readers: list[BlockReader] = []
        num_blocks = 0
        try:
            if job.block_keys:
                num_blocks = await self._load(job, readers)
        except HalfmoonError as error:
            self._count_failure(job, error)
        finally:
            released = self._spawn(self._release(readers))  # also where this call is cancelled
        if job.corrupt_in is not None:
            await asyncio.wait({released})
        job.num_cached_tokens = min(num_blocks * self._cache.page_size, job.sequence.num_tokens - 1)
        job.prefix_load_s = time.monotonic() - began

    async def _load(self, job: PrefillJob, readers: list[BlockReader]) -> int:
        """Returns how many blocks stand in the pages."""
        client, reader = await self._find(job, readers)
        if client is None or reader is None or reader.num_blocks == 0:
            return 0
        began = time.monotonic()
        try:
            await load_pages(self._cache, self._transfer, job.sequence.pages, reader)
        except HandoffCorrupt as error:
            job.corrupt_in, job.corrupt_blocks = client, error.fields["blocks"]
            raise
        job.num_bytes_loaded, job.load_transport = reader.num_bytes, client.transport
        self._metrics.transferred(client.transport, "load", reader.num_bytes, time.monotonic() - began)
        return reader.num_blocks

    async def _find(self, job: PrefillJob, readers: list[BlockReader]) -> tuple[StoreClient | None, BlockReader | None]:
        """The reader with the longest run; all that are opened are added to readers."""
        own, found = await self._fetch(job, self._stores.own.address, "local", readers)
        held = found.num_blocks if found is not None else 0
        hint = job.request.prefix
        if hint.num_blocks <= held or self._stores.is_own(hint.store_address):
            return own, found
        remote, hinted = await self._fetch(job, hint.store_address, "remote", readers)
        if hinted is not None and hinted.num_blocks > held:
            return remote, hinted
        return own, found

    async def _fetch(
        self, job: PrefillJob, address: str, tier: str, readers: list[BlockReader]
    ) -> tuple[StoreClient | None, BlockReader | None]:
        try:
            client = await self._stores.client(address)
            reader = await client.fetch_prefix(job.block_keys)
        except HalfmoonError as error:
            self._count_failure(job, error)
            return None, None
        readers.append(reader)
        block_size = self._cache.page_size
        self._metrics.prefix(tier, len(job.block_keys) * block_size, reader.num_blocks * block_size)
        return client, reader

    async def _release(self, readers: list[BlockReader]) -> None:
        await self._transfer.drained()  # a cancelled load may still be copying out of the readers' memory
        for reader in readers:
            try:
                await reader.release()
            except HalfmoonError as error:
                logger.warning("the lease on a prefix could not be released: %s", error)

    def _count_failure(self, job: PrefillJob, error: HalfmoonError) -> None:
        logger.warning("request %s: its prefix is computed, for loading failed: %s", job.sequence.request_id, error)
        self._metrics.prefix_failed(error.code)
