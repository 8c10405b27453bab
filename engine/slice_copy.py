"""Copies layers of a run of blocks between a process's pages and a store's memory, on the transfer threads.

write_slice  a reader's slice ─► pages
push_pages   pages ─► writer: some layers, without blocks that the store has already

On CUDA the device itself copies a slice of a pinned arena, in both directions, and the landing does the rest. Other slices go
through a pinned buffer. On a CPU they are plain copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..protocol.errors import RequestCancelled
from .executor import Slice, Writer
from .kv_cache import PagedKVCache
from .transfer import Landing


def write_slice(cache: PagedKVCache, pages: Sequence[int], piece: Slice) -> None:
    """Runs on the transfer thread. On CUDA it is asynchronous, and the slice's memory must stay until it has landed."""
    into = pages[piece.first_block : piece.first_block + len(piece.blocks)]
    layers = range(piece.layer, piece.layer + piece.num_layers)
    if not cache.on_cpu:
        cache.copy_in(layers, into, piece.blocks.runs)
        return
    width = cache.schema.layer_bytes
    for place, layer in enumerate(layers):
        cache.write_bytes(layer, into, [block[place * width : (place + 1) * width] for block in piece.blocks])


def push_pages(
    cache: PagedKVCache,
    pages: Sequence[int],
    writer: Writer,
    layers: range,
    first: int,
    last: int,
    are_held: Callable[[], bool] | None = None,
) -> Landing | None:
    """Pushes layers of blocks [first, last), on the transfer thread. The landing passes what the device copied to the writer.

    are_held: called after each read; True if the pages have belonged to the sequence until now. None: nobody takes them away.
    Call and landing raise what the writer raises, or RequestCancelled if the pages are not held any more.
    """
    runs = missing_runs(writer.present, first, last)
    if not runs:
        return None
    if not cache.on_cpu:
        push = _push_rows if cache.pinned.tensor(writer.memory) is not None else _push_buffers
        return push(cache, pages, writer, layers, runs, are_held)
    for layer in layers:
        for start, end in runs:
            read = cache.read_bytes(layer, pages[start:end])
            require_held(are_held)
            writer.push(layer, start, read)
    return None


def _push_rows(
    cache: PagedKVCache,
    pages: Sequence[int],
    writer: Writer,
    layers: range,
    runs: Sequence[tuple[int, int]],
    are_held: Callable[[], bool] | None,
) -> Landing:
    """The device writes into the store's memory itself."""
    open_runs: deque[tuple[int, int]] = deque()

    def land() -> None:
        try:
            require_held(are_held)
            while open_runs:
                writer.pushed(layers.start, *open_runs.popleft(), len(layers))
        finally:
            while open_runs:
                open_runs.popleft()
                writer.dropped()

    try:
        for start, end in runs:
            rows = writer.rows(layers.start, start, end, len(layers))
            open_runs.append((start, end))
            cache.copy_out(layers, pages[start:end], rows.runs)
    except BaseException:
        torch.cuda.current_stream(cache.data.device).synchronize()
        for _ in open_runs:
            writer.dropped()
        raise
    return land


def _push_buffers(
    cache: PagedKVCache,
    pages: Sequence[int],
    writer: Writer,
    layers: range,
    runs: Sequence[tuple[int, int]],
    are_held: Callable[[], bool] | None,
) -> Landing:
    """Through a pinned buffer, for a writer that takes arrays or whose memory could not be pinned."""
    buffers = [(layer, start, cache.copy_to_buffer(layer, pages[start:end])) for layer in layers for start, end in runs]

    def land() -> None:
        require_held(are_held)
        for layer, start, buffer in buffers:
            writer.push(layer, start, buffer.numpy())

    return land


def require_held(are_held: Callable[[], bool] | None) -> None:
    if are_held is not None and not are_held():
        raise RequestCancelled("the sequence lost its pages while they were read")


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
