"""Copies whole sequences between pages and the blocks of a KV store, slice by slice. Runs on the event loop.

load_pages   a reader's slices ─► pages, several under way
cache_pages   pages ─► a writer: every layer ─► sealed
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from ..protocol.errors import HalfmoonError
from ..protocol.schema import KVSchema
from ..protocol.v1 import common_pb2
from .executor import PageTransfer, Slice, Writer

MAX_SLICES = 4  # under way for one reader or writer
PUSH_BYTES = 32 * 2**20  # smaller layers go together: a push costs the host the same for any size, and the engine's thread waits


class Reader(Protocol):
    num_blocks: int

    def slices(self) -> AsyncIterator[Any]:
        """Gives slice by slice, and ends when all blocks are there and verified."""
        ...


class PageLoad:
    """A reader's slices on their way to pages. Lives on the event loop.

    If it is abandoned, the transfer thread may still read the slices' memory until it is drained.
    """

    def __init__(self, transfer: PageTransfer) -> None:
        self._transfer = transfer
        self._under_way: deque[Future[None]] = deque()

    async def write(self, pages: Sequence[int], piece: Slice) -> None:
        """pages: those of the whole sequence. Waits while MAX_SLICES slices are under way, and returns before this one is written."""
        if len(self._under_way) == MAX_SLICES:
            await _over(self._under_way.popleft())
        self._under_way.append(self._transfer.load(pages, piece))

    async def finished(self) -> None:
        """Waits until every slice is written."""
        while self._under_way:
            await _over(self._under_way.popleft())


async def _over(call: Future[None]) -> None:
    await asyncio.shield(asyncio.wrap_future(call))


async def load_pages(transfer: PageTransfer, pages: Sequence[int], reader: Reader) -> None:
    """pages: at least one for each block. Raises what the reader raises; the pages must not be used then."""
    load = PageLoad(transfer)
    async for piece in reader.slices():
        await load.write(pages, piece)
    await load.finished()


async def cache_pages(transfer: PageTransfer, pages: Sequence[int], writer: Writer, are_held: Callable[[], bool] | None = None) -> None:
    """Pushes every layer of all of the writer's blocks, and seals. As push_pages, but aborts the lease before it raises."""
    pushing: deque[Future[None]] = deque()
    try:
        for layers in layer_groups(transfer.schema, len(writer.present)):
            if len(pushing) == MAX_SLICES:
                await _over(pushing.popleft())
            pushing.append(transfer.store(pages, writer, layers, are_held))
        while pushing:
            await _over(pushing.popleft())
        await writer.seal(common_pb2.HandoffState())
    except HalfmoonError as error:
        await writer.abort(error)
        raise


def layer_groups(schema: KVSchema, num_blocks: int) -> list[range]:
    """The layers in order, in groups of about PUSH_BYTES."""
    size = max(1, PUSH_BYTES // max(1, num_blocks * schema.layer_bytes))
    return [range(first, min(first + size, schema.num_layers)) for first in range(0, schema.num_layers, size)]
