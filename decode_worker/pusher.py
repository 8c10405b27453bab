"""Keeps a finished sequence's blocks in the node's store, for the next turn of the conversation.

pages ─► transfer thread ─► store       blocks that came with the hand-off are there already and are left out
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from ..engine.kv_cache import PagedKVCache
from ..engine.transfer import TransferThread
from ..kvstore.client import BlockWriter, StoreClient
from ..protocol.blocks import block_keys
from ..protocol.errors import HalfmoonError
from ..protocol.v1 import common_pb2
from .job import DecodeJob
from .metrics import DecodeMetrics


class BlockPusher:
    def __init__(self, cache: PagedKVCache, transfer: TransferThread, metrics: DecodeMetrics) -> None:
        self._cache = cache
        self._transfer = transfer
        self._metrics = metrics

    async def keep(self, job: DecodeJob, client: StoreClient, root: bytes) -> None:
        """Stores the full blocks of prompt and answer whose KV was computed, where there is room for them at once.

        Raises StoreFull, StoreUnavailable, HandoffError.
        """
        keys = computed_keys(job, root, self._cache.page_size)
        if not keys:
            return
        began = time.monotonic()
        writer = await client.keep(keys, 0.0)
        try:
            for layer in range(self._cache.schema.num_layers):
                await self._transfer.run(partial(self._push, writer, job.sequence.pages, layer))
            await writer.seal(common_pb2.HandoffState())
        except HalfmoonError as error:
            await writer.abort(error)
            raise
        self._metrics.transferred(client.transport, "keep", writer.num_bytes, time.monotonic() - began)

    def _push(self, writer: BlockWriter, pages: Sequence[int], layer: int) -> None:
        for start, end in missing_runs(writer.present):
            writer.push(layer, start, self._cache.read_bytes(layer, pages[start:end]))


def computed_keys(job: DecodeJob, root: bytes, block_size: int) -> list[bytes]:
    """Of the full blocks whose every token has its KV in the pages; the last sampled token never has."""
    num_computed = job.sequence.num_computed_tokens // block_size
    known = job.block_keys[:num_computed]
    rest = job.sequence.token_ids[len(known) * block_size : num_computed * block_size]
    return known + block_keys(root, rest, block_size, parent=known[-1] if known else None)


def missing_runs(present: Sequence[bool]) -> list[tuple[int, int]]:
    """The maximal runs [start, end) of blocks that are not present."""
    runs: list[tuple[int, int]] = []
    for block, found in enumerate(present):
        if found:
            continue
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs
