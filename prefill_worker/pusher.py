"""Pushes a prompt's blocks from its pages to the hand-off's store while the next layer computes.

engine thread   layer 0 │ layer 1 │ layer 2 │ …          after each layer: its finished blocks go on the transfer thread's queue
transfer thread         │ push 0  │ push 1  │ …          blocks that the store has already are left out
                                  │ land 0  │ …          copied: the store is told, the checksums go on
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from ..engine.kv_cache import PagedKVCache
from ..engine.page_copy import keep_pages, push_pages
from ..engine.sequence import StepChunk
from ..engine.transfer import Landing, TransferThread
from ..kvstore.client import StoreClient
from ..protocol.blocks import div_ceil
from ..protocol.errors import HalfmoonError
from .job import PrefillJob
from .metrics import PrefillMetrics


class BlockRun(NamedTuple):
    """Blocks [first, last) of a job's sequence."""

    job: PrefillJob
    first: int
    last: int


def finished_blocks(job: PrefillJob, chunk: StepChunk, block_size: int) -> BlockRun:
    """The blocks whose last token chunk computes; the trailing partial one counts as its prompt ends in it."""
    return BlockRun(job, chunk.start // block_size, div_ceil(chunk.start + chunk.num_tokens, block_size))


class BlockPusher:
    def __init__(self, cache: PagedKVCache, transfer: TransferThread, metrics: PrefillMetrics) -> None:
        self._cache = cache
        self._transfer = transfer
        self._metrics = metrics

    def push_layer(self, runs: Sequence[BlockRun], layer: int) -> None:
        """Called by the engine's thread when layer's KV of the runs stands in the pages; does not wait."""
        self._transfer.submit(partial(self._push_layer, runs, layer), after=self._transfer.event())

    def push_prefix(self, job: PrefillJob) -> None:
        """All layers of the full blocks that were loaded, where the hand-off's store has them not."""
        run = BlockRun(job, 0, job.num_cached_tokens // self._cache.page_size)
        for layer in range(self._cache.schema.num_layers if run.last else 0):
            self._transfer.submit(partial(self._push_layer, [run], layer))

    def finish(self, jobs: Iterable[PrefillJob]) -> None:
        """Tells each call, after everything pushed for it so far, that there is no more."""
        for job in jobs:
            self._transfer.submit(lambda job=job: partial(_tell_pushed, job))

    async def keep(self, job: PrefillJob, client: StoreClient) -> None:
        """Stores the prompt's full blocks at client, from the pages, where there is room for them at once.

        Raises StoreFull, StoreUnavailable, HandoffError.
        """
        began = time.monotonic()
        writer = await client.keep(job.block_keys, 0.0)
        await keep_pages(self._cache, self._transfer, job.sequence.pages, writer)
        self._metrics.transferred(client.transport, "keep", writer.num_bytes, time.monotonic() - began)

    def _push_layer(self, runs: Sequence[BlockRun], layer: int) -> Landing:
        landings: list[tuple[PrefillJob, Landing]] = []
        for job, first, last in runs:
            if job.closed or job.writer is None:
                continue
            try:
                landing = push_pages(self._cache, job.sequence.pages, job.writer, layer, first, last)
            except HalfmoonError as error:
                _tell_failed(job, error)
            else:
                landings += [] if landing is None else [(job, landing)]
        return partial(_land, landings)


def _land(landings: Sequence[tuple[PrefillJob, Landing]]) -> None:
    for job, landing in landings:
        try:
            landing()
        except HalfmoonError as error:
            _tell_failed(job, error)


def _tell_failed(job: PrefillJob, error: HalfmoonError) -> None:
    job.task.get_loop().call_soon_threadsafe(job.fail, error)


def _tell_pushed(job: PrefillJob) -> None:
    job.task.get_loop().call_soon_threadsafe(_set_pushed, job)


def _set_pushed(job: PrefillJob) -> None:
    if not job.pushed.done():
        job.pushed.set_result(None)
