"""Pages in and out of one process's cache, on its transfer threads; and the blocks of a step, pushed while later layers compute.

step loop       layers 0-3 │ layers 4-7 │ …  │ 30 │ 31    after some layers: their finished blocks go on the transfer thread's queue
transfer thread            │ push 0-3   │ …      │ 30 │    blocks that the store has already are left out
                                        │ land 0-3 …      copied: the store is told, the checksums go on

Layers go together, for the step loop's thread waits for the interpreter while a push is prepared; the last ones by themselves, for
what they take is what the hand-off adds to the prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from ..protocol.errors import HalfmoonError
from .executor import BlockPush, Slice, Writer
from .kv_cache import PagedKVCache
from .page_copy import PUSH_BYTES
from .slice_copy import push_pages, write_slice
from .transfer import Landing, TransferThread

MIN_LAYERS = 4  # that go together even where they have more than PUSH_BYTES
TAIL_BYTES = 4 * 2**20  # the last layers go together where they have no more: 0.1 ms of a copy


class LocalPageTransfer:
    def __init__(self, cache: PagedKVCache, transfer: TransferThread) -> None:
        self.schema = cache.schema
        self._cache = cache
        self._transfer = transfer

    def load(self, pages: Sequence[int], piece: Slice) -> Future[None]:
        return self._transfer.start(partial(write_slice, self._cache, pages, piece))

    def push(self, pushes: Sequence[BlockPush], layers: range) -> None:
        self._transfer.submit(partial(_push_layers, self._cache, pushes, layers))

    def store(self, pages: Sequence[int], writer: Writer, layers: range, are_held: Callable[[], bool] | None = None) -> Future[None]:
        return self._transfer.start(partial(push_pages, self._cache, pages, writer, layers, 0, len(writer.present), are_held))

    def after_layer(self, pushes: Sequence[BlockPush]) -> StepPush:
        """To be called by the step loop's thread with each layer of a step."""
        return StepPush(self._cache, self._transfer, pushes)

    def copy(self, source: int, target: int) -> Future[None]:
        return self._transfer.start(partial(self._cache.copy_page, source, target))

    def zero_tail(self, page: int, num_tokens: int) -> None:
        self._transfer.submit(partial(self._cache.zero_tail, page, num_tokens))

    def scrub(self, pages: Sequence[int]) -> None:
        self._transfer.submit(partial(self._cache.scrub, pages))

    def when_landed(self, call: Callable[[], None]) -> None:
        self._transfer.submit(lambda: call)

    async def drained(self) -> None:
        await self._transfer.drained()

    def pin(self, memory: np.ndarray) -> None:
        """Memory that can't be pinned is used all the same, by way of buffers."""
        self._cache.pinned.pin(memory)

    def unpin(self, memory: np.ndarray) -> None:
        self._transfer.submit(partial(self._cache.pinned.release, memory))

    def close(self) -> None:
        self._transfer.close()
        self._cache.pinned.close()


class StepPush:
    """Pushes of a step, while it runs: called with a layer once its KV stands in the pages; does not wait."""

    def __init__(self, cache: PagedKVCache, transfer: TransferThread, pushes: Sequence[BlockPush]) -> None:
        self.num_layers = 0  # pushed, or on their way
        self._cache = cache
        self._transfer = transfer
        self._pushes = pushes
        num_bytes = max(1, sum(push.last - push.first for push in pushes) * cache.schema.layer_bytes)  # of a layer
        self._least, self._most = max(1, TAIL_BYTES // num_bytes), max(MIN_LAYERS, PUSH_BYTES // num_bytes)

    def __call__(self, layer: int) -> None:
        first, last, num_layers = self.num_layers, layer + 1, self._cache.schema.num_layers
        if last == num_layers or last - first >= min(self._most, max(self._least, (num_layers - last) // 2)):
            self._transfer.submit(partial(_push_layers, self._cache, self._pushes, range(first, last)), after=self._transfer.event())
            self.num_layers = last


def _push_layers(cache: PagedKVCache, pushes: Sequence[BlockPush], layers: range) -> Landing:
    """On the transfer thread."""
    landings: list[tuple[BlockPush, Landing]] = []
    for push in pushes:
        if push.listener.closed:
            continue
        try:
            landing = push_pages(cache, push.pages, push.writer, layers, push.first, push.last)
        except HalfmoonError as error:
            push.listener.push_failed(error)
        else:
            landings += [] if landing is None else [(push, landing)]
    return partial(_land, landings)


def _land(landings: Sequence[tuple[BlockPush, Landing]]) -> None:
    for push, landing in landings:
        try:
            landing()
        except HalfmoonError as error:
            push.listener.push_failed(error)
