"""Pages in and out where each rank has its own heads of them: every rank copies its part, and what waits, waits for all of them.

transfer thread   call ─► the other ranks, in its order ─┐  each: its heads ◄─► the block's row in the node's memory, on its own device
                    └─ rank 0's own heads ───────────────┴─► all are done ─► the writer is told, the future is done

A row is that of an arena which all ranks map. Bytes of other transports stand in memory of rank 0 alone: they go by way of a buffer
that the ranks share, piece by piece.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch

from ...protocol.schema import KVSchema
from ..executor import BlockPush, NodeMemory, Slice, Writer
from ..kv_cache import PagedKVCache
from ..page_transfer import LocalPageTransfer, push_layers
from ..shard import Shard
from ..slice_copy import missing_runs, require_held
from ..transfer import Landing, TransferThread
from . import head_rows
from .link import of_text
from .memory import SharedMemory
from .pages import NO_STEP, Behind, PageCall, pin_buffer
from .processes import RankProcesses
from .step_wire import StepWriter

logger = logging.getLogger(__name__)


class RankPageTransfer(LocalPageTransfer):
    """Rank 0's side.

    Args:
        schema: of whole blocks.
        steps: which of them is under way.
        memory: with the buffer.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        transfer: TransferThread,
        *,
        schema: KVSchema,
        shard: Shard,
        ranks: RankProcesses,
        steps: StepWriter,
        memory: SharedMemory,
    ) -> None:
        super().__init__(cache, transfer)
        self.schema = schema
        self._shard = shard
        self._ranks = ranks
        self._steps = steps
        self._memory = memory
        self._num_memories = 0
        pin_buffer(cache, memory)

    def copy(self, source: int, target: int) -> Future[None]:
        return self._transfer.start(
            partial(self._everywhere, PageCall.COPY, [source, target], partial(self._cache.copy_page, source, target))
        )

    def zero_tail(self, page: int, num_tokens: int) -> None:
        own = partial(self._cache.zero_tail, page, num_tokens)
        self._transfer.submit(partial(self._everywhere, PageCall.ZERO_TAIL, [page, num_tokens], own))

    def scrub(self, pages: Sequence[int]) -> None:
        self._transfer.submit(partial(self._everywhere, PageCall.SCRUB, list(pages), partial(self._cache.scrub, pages)))

    def pin(self, arena: NodeMemory) -> None:
        """Where a rank can't map or pin it, its rows are copied by way of the buffer."""
        self._transfer.start(partial(self._add, arena)).result()

    def unpin(self, memory: np.ndarray) -> None:
        self._transfer.submit(partial(self._remove, memory))

    def _add(self, arena: NodeMemory) -> None:
        self._num_memories += 1
        number, memory = self._num_memories, arena.memory
        call = self._ranks.call(PageCall.MAP, [*NO_STEP, number, arena.offset, memory.nbytes, *of_text(arena.path)])
        is_pinned = self._cache.on_cpu or self._cache.pinned.pin(memory)
        if self._ranks.wait(call) and is_pinned:
            self._memory.add(number, memory)
        else:
            logger.warning("a rank can't use the arena %s by itself; blocks go by way of a buffer, which takes longer", arena.path)

    def _remove(self, memory: np.ndarray) -> Landing | None:
        number = self._memory.number_of(memory)
        unpinned = self._cache.pinned.release(memory)
        if number is None:
            return unpinned
        self._memory.remove(number)
        call = self._ranks.call(PageCall.UNMAP, [*NO_STEP, number])

        def land() -> None:
            self._ranks.wait(call)
            if unpinned is not None:
                unpinned()

        return land

    def _everywhere(self, kind: PageCall, message: list[int], own: Callable[[], None]) -> Landing:
        call = self._ranks.call(kind, [*NO_STEP, *message])
        own()
        return partial(self._wait, call)

    def _wait(self, call: int) -> None:
        self._ranks.wait(call)

    def _write_slice(self, pages: Sequence[int], piece: Slice) -> Landing | None:
        into = pages[piece.first_block : piece.first_block + len(piece.blocks)]
        layers, runs = range(piece.layer, piece.layer + piece.num_layers), piece.blocks.runs
        if self._memory.places(runs) is not None:
            return partial(self._wait, self._copy(PageCall.IN, layers, into, runs, NO_STEP))
        start = 0
        for run in runs:
            for place, layer in enumerate(layers):
                width = self.schema.layer_bytes
                for first, buffer in self._buffers(len(run)):
                    rows = slice(first, first + len(buffer))
                    buffer[:] = run[rows, place * width : (place + 1) * width]
                    of_run = into[start + first : start + first + len(buffer)]
                    self._finish(self._copy(PageCall.IN, range(layer, layer + 1), of_run, [buffer], NO_STEP))
            start += len(run)
        return None

    def _push_computed(self, pushes: Sequence[BlockPush], layers: range) -> None:
        behind = Behind(self._steps.number, layers.stop - 1)  # the other ranks may not be there yet
        push_pages = partial(self._push_pages, behind=behind)
        self._transfer.submit(partial(push_layers, push_pages, pushes, layers), after=self._transfer.event())

    def _push_pages(
        self,
        pages: Sequence[int],
        writer: Writer,
        layers: range,
        first: int,
        last: int,
        are_held: Callable[[], bool] | None = None,
        behind: Behind = NO_STEP,
    ) -> Landing | None:
        runs = missing_runs(writer.present, first, last)
        if not runs:
            return None
        if writer.memory is None or self._memory.number_of(writer.memory) is None:
            self._push_buffers(pages, writer, layers, runs, are_held, behind)
            return None
        return self._push_rows(pages, writer, layers, runs, are_held, behind)

    def _push_rows(
        self,
        pages: Sequence[int],
        writer: Writer,
        layers: range,
        runs: Sequence[tuple[int, int]],
        are_held: Callable[[], bool] | None,
        behind: Behind,
    ) -> Landing:
        """Every rank writes into the store's memory itself."""
        under_way: deque[tuple[int, int, int]] = deque()  # first and last block, and the other ranks' call

        def land() -> None:
            try:
                for _, _, call in under_way:
                    self._ranks.wait(call)
                require_held(are_held)
                while under_way:
                    start, end, _ = under_way.popleft()
                    writer.pushed(layers.start, start, end, len(layers))
            finally:
                while under_way:
                    under_way.popleft()
                    writer.dropped()

        try:
            for start, end in runs:
                rows = writer.rows(layers.start, start, end, len(layers))
                try:
                    call = self._copy(PageCall.OUT, layers, pages[start:end], rows.runs, behind)
                except BaseException:
                    writer.dropped()
                    raise
                under_way.append((start, end, call))
        except BaseException:
            for _, _, call in under_way:
                self._finish(call)
                writer.dropped()
            raise
        return land

    def _push_buffers(
        self,
        pages: Sequence[int],
        writer: Writer,
        layers: range,
        runs: Sequence[tuple[int, int]],
        are_held: Callable[[], bool] | None,
        behind: Behind,
    ) -> None:
        """For a writer that takes arrays, or whose memory not every rank can use."""
        for layer in layers:
            for start, end in runs:
                for first, buffer in self._buffers(end - start):
                    block = start + first
                    of_pages = pages[block : block + len(buffer)]
                    self._finish(self._copy(PageCall.OUT, range(layer, layer + 1), of_pages, [buffer], behind))
                    require_held(are_held)
                    writer.push(layer, block, buffer)

    def _copy(self, kind: PageCall, layers: range, pages: Sequence[int], runs: Sequence[np.ndarray], behind: Behind) -> int:
        """Starts every rank's copy, and does rank 0's. Returns the others' call."""
        places = self._memory.places(runs)
        assert places is not None, "these rows are in no memory that the ranks share"
        numbers = [number for place in places for number in place]
        call = self._ranks.call(kind, [*behind, layers.start, len(layers), len(pages), *pages, *numbers])
        copy = head_rows.copy_out if kind is PageCall.OUT else head_rows.copy_in
        try:
            copy(self._cache, self._shard, layers, pages, runs)
        except BaseException:
            self._finish(call)  # nobody copies any more when this is told
            raise
        return call

    def _finish(self, call: int) -> None:
        self._synchronize()
        self._ranks.wait(call)

    def _synchronize(self) -> None:
        if not self._cache.on_cpu:
            torch.cuda.current_stream(self._cache.data.device).synchronize()

    def _buffers(self, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, uint8 [rows, layer_bytes]) over num_rows rows, in the buffer, one after another."""
        width = self.schema.layer_bytes
        most = self._memory.buffer.nbytes // width
        for first in range(0, num_rows, most):
            count = min(most, num_rows - first)
            yield first, self._memory.buffer[: count * width].reshape(count, width)
