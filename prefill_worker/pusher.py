"""Pushes a prompt's blocks from its pages to the hand-off's store while the next layer computes.

engine thread   layers 0-3 │ layers 4-7 │ …  │ 30 │ 31    after some layers: their finished blocks go on the transfer thread's queue
transfer thread            │ push 0-3   │ …      │ 30 │    blocks that the store has already are left out
                                        │ land 0-3 …      copied: the store is told, the checksums go on

Layers go together, for the engine's thread waits for the interpreter while a push is prepared; the last ones by themselves, for what
they take is what the hand-off adds to the prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from ..engine.kv_cache import PagedKVCache
from ..engine.page_copy import PUSH_BYTES, keep_pages, layer_groups, push_pages
from ..engine.sequence import StepChunk
from ..engine.transfer import Landing, TransferThread
from ..kvstore.client import StoreClient
from ..protocol.blocks import div_ceil
from ..protocol.errors import HalfmoonError
from .job import PrefillJob
from .metrics import PrefillMetrics

MIN_LAYERS = 4  # that go together even where they have more than PUSH_BYTES
TAIL_BYTES = 4 * 2**20  # the last layers go together where they have no more: 0.1 ms of a copy


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

    def step(self, runs: Sequence[BlockRun]) -> Callable[[int], None]:
        """To be called by the engine's thread with each layer of a step, when its KV of the runs stands in the pages; does not wait."""
        schema = self._cache.schema
        first, num_bytes = 0, max(1, sum(run.last - run.first for run in runs) * schema.layer_bytes)  # of a layer
        least, most = max(1, TAIL_BYTES // num_bytes), max(MIN_LAYERS, PUSH_BYTES // num_bytes)

        def layer_done(layer: int) -> None:
            nonlocal first
            last = layer + 1
            if last == schema.num_layers or last - first >= min(most, max(least, (schema.num_layers - last) // 2)):
                self._transfer.submit(partial(self._push_layers, runs, range(first, last)), after=self._transfer.event())
                first = last

        return layer_done

    def push_prefix(self, job: PrefillJob) -> None:
        """All layers of the full blocks that were loaded, where the hand-off's store has them not."""
        run = BlockRun(job, 0, job.num_cached_tokens // self._cache.page_size)
        for layers in layer_groups(self._cache.schema, run.last) if run.last else ():
            self._transfer.submit(partial(self._push_layers, [run], layers))

    def finish(self, jobs: Iterable[PrefillJob]) -> None:
        """Tells each call, after everything pushed for it so far, that there is no more."""
        for job in jobs:
            self._transfer.submit(lambda job=job: partial(_tell_pushed, job))

    async def keep(self, job: PrefillJob, client: StoreClient) -> None:
        """Stores the prompt's full blocks at client, from the pages, where there is room for them at once.

        Raises StoreFull, StoreUnavailable, HandoffError.
        """
        began = time.monotonic()
        writer = await client.cache(job.block_keys, 0.0)
        await keep_pages(self._cache, self._transfer, job.sequence.pages, writer)
        self._metrics.transferred(client.transport, "keep", writer.num_bytes, time.monotonic() - began)

    def _push_layers(self, runs: Sequence[BlockRun], layers: range) -> Landing:
        landings: list[tuple[PrefillJob, Landing]] = []
        for job, first, last in runs:
            if job.closed or job.writer is None:
                continue
            try:
                landing = push_pages(self._cache, job.sequence.pages, job.writer, layers, first, last)
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
