"""Pushes a prompt's blocks from its pages to the hand-off's store while the next layer computes.

engine thread   layer 0 │ layer 1 │ layer 2 │ …          after each layer: its finished blocks go on the transfer thread's queue
transfer thread         │ push 0  │ push 1  │ …          blocks that the store has already are left out
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from ..engine.kv_cache import PagedKVCache
from ..engine.sequence import StepChunk
from ..engine.transfer import TransferThread
from ..kvstore.client import BlockWriter, StoreClient
from ..protocol.blocks import div_ceil
from ..protocol.errors import HalfmoonError
from ..protocol.v1 import common_pb2
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
            self._transfer.submit(partial(_tell_pushed, job))

    async def keep(self, job: PrefillJob, client: StoreClient) -> None:
        """Stores the prompt's full blocks at client, from the pages, where there is room for them at once.

        Raises StoreFull, StoreUnavailable, HandoffError.
        """
        began = time.monotonic()
        writer = await client.keep(job.block_keys, 0.0)
        try:
            for layer in range(self._cache.schema.num_layers):
                await self._transfer.run(partial(self._push, writer, job.sequence.pages, layer, 0, writer.num_blocks))
            await writer.seal(common_pb2.HandoffState())
        except HalfmoonError as error:
            await writer.abort(error)
            raise
        self._metrics.transferred(client.transport, "keep", writer.num_bytes, time.monotonic() - began)

    def _push_layer(self, runs: Sequence[BlockRun], layer: int) -> None:
        for job, first, last in runs:
            if job.closed or job.writer is None:
                continue
            try:
                self._push(job.writer, job.sequence.pages, layer, first, last)
            except HalfmoonError as error:
                job.task.get_loop().call_soon_threadsafe(job.fail, error)

    def _push(self, writer: BlockWriter, pages: Sequence[int], layer: int, first: int, last: int) -> None:
        for start, end in missing_runs(writer.present, first, last):
            writer.push(layer, start, self._cache.read_bytes(layer, pages[start:end]))


def missing_runs(present: Sequence[bool], first: int, last: int) -> list[tuple[int, int]]:
    """The maximal runs [start, end) of blocks within [first, last) that are not present."""
    runs: list[tuple[int, int]] = []
    for block in range(first, last):
        if present[block]:
            continue
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def _tell_pushed(job: PrefillJob) -> None:
    job.task.get_loop().call_soon_threadsafe(_set_pushed, job)


def _set_pushed(job: PrefillJob) -> None:
    if not job.pushed.done():
        job.pushed.set_result(None)
