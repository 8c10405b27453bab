"""Copies blocks from pages to a store, where they are cached for later requests."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..kvstore.client import StoreClient
from .executor import PageTransfer
from .page_copy import cache_pages
from .worker_metrics import WorkerMetrics


class BlockCacher:
    """Lives on the event loop."""

    def __init__(self, pages: PageTransfer, metrics: WorkerMetrics) -> None:
        self._pages = pages
        self._metrics = metrics

    async def cache(self, client: StoreClient, keys: list[bytes], pages: list[int], are_held: Callable[[], bool] | None = None) -> None:
        """Caches full blocks at client, the first len(keys) of pages, if there is room for them at once.

        are_held: as PageTransfer.store's. Raises StoreFull, StoreUnavailable, HandoffError, RequestCancelled.
        """
        began = time.monotonic()
        writer = await client.cache(keys, 0.0)
        await cache_pages(self._pages, pages, writer, are_held)
        self._metrics.transferred(client.transport, "cache", writer.num_bytes, time.monotonic() - began)
