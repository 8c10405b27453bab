"""Copies between a sequence's pages and the blocks of a KV store. The store's side is known by its shape alone.

load_pages   reader's slices ─► transfer thread ─► pages
push_pages   pages ─► writer: one layer, less what the store has already
keep_pages   pages ─► transfer thread ─► writer: every layer ─► sealed
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..protocol.errors import HalfmoonError, RequestCancelled
from ..protocol.v1 import common_pb2
from .kv_cache import PagedKVCache
from .transfer import TransferThread


class Slice(Protocol):
    """One layer of a run of blocks: uint8 [layer_bytes] each."""

    @property
    def layer(self) -> int: ...
    @property
    def first_block(self) -> int: ...
    @property
    def blocks(self) -> list[np.ndarray]: ...


class Reader(Protocol):
    num_blocks: int

    def slices(self) -> AsyncIterator[Any]:
        """Slice by Slice; ends when all is there and right."""
        ...


class Writer(Protocol):
    present: list[bool]

    def push(self, layer: int, first_block: int, blocks: np.ndarray) -> None: ...

    async def seal(self, state: common_pb2.HandoffState) -> None: ...

    async def abort(self, reason: HalfmoonError) -> None: ...


async def load_pages(cache: PagedKVCache, transfer: TransferThread, pages: Sequence[int], reader: Reader) -> None:
    """pages: one a block at least. Raises what the reader raises: the pages must not be used then."""
    async for piece in reader.slices():
        await transfer.run(partial(write_slices, cache, pages, [piece]))


def write_slices(cache: PagedKVCache, pages: Sequence[int], slices: Sequence[Slice]) -> None:
    """On the transfer thread."""
    for piece in slices:
        cache.write_bytes(piece.layer, pages[piece.first_block : piece.first_block + len(piece.blocks)], piece.blocks)


def push_pages(
    cache: PagedKVCache,
    pages: Sequence[int],
    writer: Writer,
    layer: int,
    first: int,
    last: int,
    are_held: Callable[[], bool] | None = None,
) -> None:
    """One layer of blocks [first, last), on the transfer thread.

    are_held: asked after each read, whether the pages were the sequence's until now. None: nobody takes them away.
    Raises what the writer raises, RequestCancelled where the pages are not held any more.
    """
    for start, end in missing_runs(writer.present, first, last):
        read = cache.read_bytes(layer, pages[start:end])
        if are_held is not None and not are_held():
            raise RequestCancelled("the sequence lost its pages while they were read")
        writer.push(layer, start, read)


async def keep_pages(
    cache: PagedKVCache, transfer: TransferThread, pages: Sequence[int], writer: Writer, are_held: Callable[[], bool] | None = None
) -> None:
    """Every layer of all of the writer's blocks, and the seal. As push_pages; gives the lease up before it raises."""
    try:
        for layer in range(cache.schema.num_layers):
            await transfer.run(partial(push_pages, cache, pages, writer, layer, 0, len(writer.present), are_held))
        await writer.seal(common_pb2.HandoffState())
    except HalfmoonError as error:
        await writer.abort(error)
        raise


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
