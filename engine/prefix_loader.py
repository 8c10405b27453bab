"""Loads the longest cached prefix of a prompt into its pages, so that it is not computed.

blocks in the worker's pages: shared when the sequence got its own, nothing to do
behind them  own store: the longest run ───────────┐
             a store that the proxy names, if longer ─┴─► slices ─► transfer thread ─► pages
behind those a block in the worker's pages that begins alike ─► that page is copied

Computing begins when every slice has arrived and every checksum matched, not layer by layer: what had been computed from a
block that turns out corrupt would have been pushed or decoded by then. Other prompts' chunks run meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from ..kvstore.client import BlockReader, StoreClient
from ..protocol.errors import HalfmoonError, HandoffCorrupt
from ..protocol.v1 import common_pb2, worker_pb2
from .executor import PageTransfer
from .page_allocator import PageAllocator
from .page_copy import load_pages
from .sequence import Sequence
from .stores import Stores
from .worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)

NO_HINT = worker_pb2.PrefixHint()
HALF_LIFE_TOKENS = 2048  # computed, after which a step has half its weight in the mean of what a token takes


@dataclass(slots=True)
class CachedPrefix:
    """What was loaded of a prompt."""

    num_tokens: int = 0  # whose KV stands in the pages: less than all, for the last one gives the first logits
    load_s: float = 0.0  # looking for it included
    num_bytes: int = 0
    transport: str = ""
    ssd_wait_s: float = 0.0  # of load_s: stores read blocks from SSD
    num_bytes_ssd: int = 0  # that ssd_store, an address, read for this load alone; 0: none, or not to be told from other reads
    ssd_store: str = ""
    corrupt_in: StoreClient | None = None  # the store whose cached blocks did not match their checksums
    corrupt_blocks: list[int] = field(default_factory=list)


class PrefixLoader:
    """On the event loop. spawn: runs a coroutine in the background until the worker stops."""

    def __init__(
        self,
        pages: PageTransfer,
        allocator: PageAllocator,
        changed: threading.Condition,
        stores: Stores,
        metrics: WorkerMetrics,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        """changed: guards the allocator."""
        self._pages = pages
        self._allocator = allocator
        self._changed = changed
        self._stores = stores
        self._metrics = metrics
        self._spawn = spawn
        self._seconds_per_token = 0.0  # of computing, lately; 0: not known yet

    def computed(self, seconds_per_token: float, num_tokens: int) -> None:
        """A prompt's tokens took so long each: a block that a store has on SSD alone is loaded only where that is faster.

        A few tokens pay for a whole step, so they say little of many.
        """
        known = self._seconds_per_token or seconds_per_token
        self._seconds_per_token = known + (1.0 - 0.5 ** (num_tokens / HALF_LIFE_TOKENS)) * (seconds_per_token - known)

    async def load(
        self,
        sequence: Sequence,
        block_keys: list[bytes],
        hint: worker_pb2.PrefixHint = NO_HINT,
        *,
        skip_own_store: bool = False,
        own_ssd: common_pb2.SsdUse = common_pb2.SSD_USE_UNSPECIFIED,
    ) -> CachedPrefix:
        """block_keys: of the prompt's full blocks. hint: a store beside the own one that may hold more of them. skip_own_store: it is
        gone, or does not answer. own_ssd: whether it may read from SSD, as the hint says it of the other store.

        Nothing for a sequence that scores its prompt: what is loaded gives no logits.

        Never fails: a prefix that is corrupt or gone is computed, with a warning and a count. What was corrupt is not in its
        store any more when this returns, and noted: others may have been promised it meanwhile.
        """
        began, found, failed = time.monotonic(), CachedPrefix(), False
        if sequence.scores_prompt:
            return found
        readers: list[BlockReader] = []
        block_size = self._pages.schema.block_size
        own = None if skip_own_store else own_ssd
        num_blocks = num_shared = sequence.num_computed_tokens // block_size
        try:
            if num_shared < len(block_keys):
                num_blocks += await self._load(sequence, block_keys, num_shared, hint, own, found, readers)
        except HalfmoonError as error:
            failed = True
            self._count_failure(sequence, error)
        finally:
            # also where this call is cancelled
            released = self._spawn(self._release(readers), f"releasing the prefix of {sequence.request_id}")
        if failed:  # slices may still be on their way into the pages
            await asyncio.wait({released})
        found.num_tokens = await self._finish_in_pages(sequence, min(num_blocks * block_size, sequence.num_tokens - 1))
        if self._allocator.prefixes is not None:
            num_in_pages = found.num_tokens - (num_blocks - num_shared) * block_size
            self._metrics.prefix("hbm", sequence.num_tokens, max(num_in_pages, 0))
        found.load_s = time.monotonic() - began
        return found

    async def _finish_in_pages(self, sequence: Sequence, num_tokens: int) -> int:
        """Takes in what came to the worker's pages behind its first num_tokens: blocks, and the beginning of one. All that it has then."""
        with self._changed:
            num_tokens = self._allocator.advance(sequence, num_tokens)
            part = None if num_tokens % self._pages.schema.block_size else self._allocator.hold_part(sequence, num_tokens)
        if part is None:
            return num_tokens
        target = sequence.pages[num_tokens // self._pages.schema.block_size]
        copying = self._spawn(self._copy(part.page, target), f"copying part of a block for {sequence.request_id}")
        await asyncio.shield(copying)  # to its end, also where this call is cancelled
        return num_tokens + part.num_tokens

    async def _copy(self, source: int, target: int) -> None:
        """And lets go of the source."""
        try:
            await asyncio.wrap_future(self._pages.copy(source, target))
        finally:
            with self._changed:
                self._allocator.free([source])

    async def _load(
        self,
        sequence: Sequence,
        keys: list[bytes],
        num_shared: int,
        hint: worker_pb2.PrefixHint,
        own_ssd: common_pb2.SsdUse | None,
        found: CachedPrefix,
        readers: list[BlockReader],
    ) -> int:
        """The blocks behind the first num_shared. Returns how many of them stand in the pages. own_ssd: None skips the own store."""
        num_hinted = hint.num_blocks - num_shared
        client, reader = await self._find(sequence, keys[num_shared:], num_hinted, hint, own_ssd, readers)
        found.ssd_wait_s = sum(one.ssd_wait_s for one in readers)
        if client is None or reader is None:
            return 0
        if reader.ssd_wait_s == found.ssd_wait_s:  # else another store read, too
            found.num_bytes_ssd, found.ssd_store = reader.num_ssd_blocks * self._pages.schema.block_bytes, client.address
        if reader.num_blocks == 0:
            return 0
        began = time.monotonic()
        try:
            await load_pages(self._pages, sequence.pages[num_shared:], reader)
        except HandoffCorrupt as error:
            found.corrupt_in, found.corrupt_blocks = client, [num_shared + block for block in error.fields["blocks"]]
            raise
        found.num_bytes, found.transport = reader.num_bytes, client.transport
        self._metrics.transferred(client.transport, "load", reader.num_bytes, time.monotonic() - began)
        return reader.num_blocks

    async def _find(
        self,
        sequence: Sequence,
        keys: list[bytes],
        num_hinted: int,
        hint: worker_pb2.PrefixHint,
        own_ssd: common_pb2.SsdUse | None,
        readers: list[BlockReader],
    ) -> tuple[StoreClient | None, BlockReader | None]:
        """The reader with the longest run; all that are opened are added to readers. num_hinted: blocks that the hinted store may hold."""
        own, found = None, None
        if own_ssd is not None:
            own, found = await self._fetch(sequence, keys, self._stores.own.address, "local", own_ssd, readers)
        held = found.num_blocks if found is not None else 0
        if num_hinted <= held or self._stores.is_own(hint.store_address):
            return own, found
        remote, hinted = await self._fetch(sequence, keys, hint.store_address, "remote", hint.ssd, readers)
        if hinted is not None and hinted.num_blocks > held:
            return remote, hinted
        return own, found

    async def _fetch(
        self, sequence: Sequence, keys: list[bytes], address: str, tier: str, ssd: common_pb2.SsdUse, readers: list[BlockReader]
    ) -> tuple[StoreClient | None, BlockReader | None]:
        try:
            client = await self._stores.client(address)
            reader = await client.fetch_prefix(keys, self._seconds_per_token * self._pages.schema.block_size, ssd)
        except HalfmoonError as error:
            self._count_failure(sequence, error)
            return None, None
        readers.append(reader)
        block_size = self._pages.schema.block_size
        self._metrics.prefix(tier, len(keys) * block_size, reader.num_blocks * block_size)
        return client, reader

    async def _release(self, readers: list[BlockReader]) -> None:
        await self._pages.drained()  # a load that was given up may still be copying out of the readers' memory
        for reader in readers:
            try:
                await reader.release()
            except HalfmoonError as error:
                logger.warning("the lease on a prefix could not be released: %s", error)

    def _count_failure(self, sequence: Sequence, error: HalfmoonError) -> None:
        logger.warning("request %s: its prefix is computed, for loading failed: %s", sequence.request_id, error)
        self._metrics.prefix_failed(error.code)
