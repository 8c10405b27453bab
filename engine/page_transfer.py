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
from ..protocol.schema import KVSchema
from .executor import BlockPush, NodeMemory, Slice, Writer
from .kv_cache import PagedKVCache
from .page_copy import PUSH_BYTES
from .slice_copy import push_pages, write_slice
from .transfer import Landing, TransferThread
from .work_front import WorkFront

MIN_LAYERS = 4  # that go together even where they have more than PUSH_BYTES
TAIL_BYTES = 4 * 2**20  # the last layers go together where they have no more: 0.1 ms of a copy


class LocalPageTransfer:
    def __init__(self, cache: PagedKVCache, transfer: TransferThread) -> None:
        self.schema = cache.schema
        self._cache = cache
        self._transfer = transfer

    @property
    def front(self) -> WorkFront:
        return self._transfer.front

    def load(self, pages: Sequence[int], piece: Slice) -> Future[None]:
        return self._transfer.start(partial(self._write_slice, pages, piece))

    def push(self, pushes: Sequence[BlockPush], layers: range) -> None:
        self._transfer.submit(partial(push_layers, self._push_pages, pushes, layers))

    def store(self, pages: Sequence[int], writer: Writer, layers: range, are_held: Callable[[], bool] | None = None) -> Future[None]:
        return self._transfer.start(partial(self._push_pages, pages, writer, layers, 0, len(writer.present), are_held))

    def after_layer(self, pushes: Sequence[BlockPush]) -> StepPush:
        """To be called by the step loop's thread with each layer of a step."""
        return StepPush(self.schema, pushes, self._push_computed)

    def _push_computed(self, pushes: Sequence[BlockPush], layers: range) -> None:
        """Layers that the calling thread has given the device to compute."""
        self._transfer.submit(partial(push_layers, self._push_pages, pushes, layers), after=self._transfer.event())

    def _write_slice(self, pages: Sequence[int], piece: Slice) -> Landing | None:
        """On the transfer thread, as _push_pages."""
        return write_slice(self._cache, pages, piece)

    def _push_pages(
        self, pages: Sequence[int], writer: Writer, layers: range, first: int, last: int, are_held: Callable[[], bool] | None = None
    ) -> Landing | None:
        return push_pages(self._cache, pages, writer, layers, first, last, are_held)

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

    def pin(self, arena: NodeMemory) -> None:
        """Memory that can't be pinned is used all the same, by way of buffers."""
        self._cache.pinned.pin(arena.memory)

    def unpin(self, memory: np.ndarray) -> None:
        self._transfer.submit(partial(self._cache.pinned.release, memory))

    def close(self) -> None:
        self._transfer.close()
        self._cache.pinned.close()


class StepPush:
    """Pushes of a step, while it runs: called with a layer once its KV stands in the pages; does not wait."""

    def __init__(self, schema: KVSchema, pushes: Sequence[BlockPush], push: Callable[[Sequence[BlockPush], range], None]) -> None:
        """push: called with layers that go together."""
        self.num_layers = 0  # pushed, or on their way
        self._num_model_layers = schema.num_layers
        self._pushes = pushes
        self._push = push
        num_bytes = max(1, sum(one.last - one.first for one in pushes) * schema.layer_bytes)  # of a layer
        self._least, self._most = max(1, TAIL_BYTES // num_bytes), max(MIN_LAYERS, PUSH_BYTES // num_bytes)

    def __call__(self, layer: int) -> None:
        first, last, num_layers = self.num_layers, layer + 1, self._num_model_layers
        if last == num_layers or last - first >= min(self._most, max(self._least, (num_layers - last) // 2)):
            self._push(self._pushes, range(first, last))
            self.num_layers = last


def push_layers(push_pages: Callable[..., Landing | None], pushes: Sequence[BlockPush], layers: range) -> Landing:
    """On the transfer thread. push_pages: as LocalPageTransfer's."""
    landings: list[tuple[BlockPush, Landing]] = []
    for push in pushes:
        if push.listener.closed:
            continue
        try:
            landing = push_pages(push.pages, push.writer, layers, push.first, push.last)
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
