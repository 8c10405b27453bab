"""Another rank's side of pages in and out: it copies its own heads where rank 0 says, in the order in which it is told.

reading thread   call ─► its step has come that far? ─► transfer thread ─► copied ─► DONE
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import torch

from ...protocol.errors import MachineError
from ..engine import Engine
from ..kv_cache import PagedKVCache
from ..shard import Shard
from ..transfer import Landing, TransferThread
from . import head_rows
from .link import Link, to_text
from .memory import Place, SharedMemory
from .processes import DONE

logger = logging.getLogger(__name__)

KEPT_STEPS = 8  # whose events are kept; a push that comes later waits for all that the device was given


class PageCall(enum.IntEnum):
    OUT = 0  # step, layer; first layer, layers, pages …, places …
    IN = 1
    COPY = 2  # step, layer; source, target
    ZERO_TAIL = 3  # step, layer; page, tokens that stay
    SCRUB = 4  # step, layer; pages …
    MAP = 5  # step, layer; number, offset, bytes, path …
    UNMAP = 6  # step, layer; number


class Behind(NamedTuple):
    """A layer of a step that has to stand in the pages before they are read."""

    step: int
    layer: int


NO_STEP = Behind(0, 0)  # pages that no step writes to


def pin_buffer(cache: PagedKVCache, memory: SharedMemory) -> None:
    """Raises MachineError where a GPU can't copy to and from the ranks' buffer by itself."""
    if not cache.pinned.pin(memory.buffer) and not cache.on_cpu:
        size = memory.buffer.nbytes // 2**20
        raise MachineError(
            f"{size} MiB that the ranks share can't be pinned; raise the limit of locked memory (ulimit -l, --ulimit memlock=-1)"
        )


class StepProgress:
    """How far the steps are whose blocks are pushed. The step's thread reports, the reading thread waits."""

    def __init__(self, event: Callable[[], torch.cuda.Event | None]) -> None:
        """event: after what the calling thread has given the device."""
        self._event = event
        self._changed = threading.Condition()
        self._newest = 0
        self._layers: dict[int, list[torch.cuda.Event | None]] = {}  # by step, an event for each layer so far

    def hook(self, step: int) -> Callable[[int], None]:
        """To be called with each layer of the step."""
        with self._changed:
            self._newest = step
            self._layers = {number: events for number, events in self._layers.items() if number > step - KEPT_STEPS}
            self._layers[step] = []
            self._changed.notify_all()
        return partial(self._reached, step)

    def wait(self, behind: Behind) -> torch.cuda.Event | None:
        """Until the layer was given to the device. What the pages' copies have to come after; None: nothing."""
        if behind == NO_STEP:
            return None
        with self._changed:
            self._changed.wait_for(lambda: self._is_old(behind.step) or len(self._layers.get(behind.step, ())) > behind.layer)
            return self._event() if self._is_old(behind.step) else self._layers[behind.step][behind.layer]

    def _is_old(self, step: int) -> bool:
        return step <= self._newest - KEPT_STEPS

    def _reached(self, step: int, layer: int) -> None:
        event = self._event()
        with self._changed:
            self._layers[step].append(event)
            self._changed.notify_all()


class RankPages:
    def __init__(self, engine: Engine, shard: Shard, link: Link, memory: SharedMemory, on_crash: Callable[[BaseException], None]) -> None:
        self._cache = engine.cache
        self._shard = shard
        self._link = link
        self._memory = memory
        self._on_crash = on_crash
        self._layer_bytes = engine.schema.layer_bytes  # of whole blocks
        self._transfer = TransferThread("rank-transfer", engine.device, on_crash)
        self.progress = StepProgress(self._transfer.event)
        pin_buffer(self._cache, memory)

    def serve(self) -> None:
        """Until rank 0 is gone; on a thread of its own."""
        while (message := self._link.receive()) is not None:
            kind, number, step, layer, *rest = message
            after = self.progress.wait(Behind(step, layer))
            if kind == PageCall.MAP:
                self._transfer.start(lambda: None).result()
                self._done(number, self._map(rest))
                continue
            done = self._transfer.start(partial(self._carry_out, PageCall(kind), rest), after)
            done.add_done_callback(partial(self._over, number))

    def close(self) -> None:
        """Waits for what was asked for."""
        self._transfer.close()

    def _over(self, number: int, done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._on_crash(error)
        else:
            self._done(number, True)

    def _done(self, number: int, went_well: bool) -> None:
        self._link.send([DONE, number, went_well])

    def _carry_out(self, kind: PageCall, rest: list[int]) -> Landing | None:
        cache = self._cache
        if kind in (PageCall.OUT, PageCall.IN):
            self._copy(kind, rest)
        elif kind is PageCall.COPY:
            cache.copy_page(*rest)
        elif kind is PageCall.ZERO_TAIL:
            cache.zero_tail(*rest)
        elif kind is PageCall.SCRUB:
            cache.scrub(rest)
        elif kind is PageCall.UNMAP:
            return self._unmap(rest[0])
        return None

    def _copy(self, kind: PageCall, rest: list[int]) -> None:
        first_layer, num_layers, num_pages, *rest = rest
        pages, numbers = rest[:num_pages], rest[num_pages:]
        places = [Place(*numbers[start : start + 4]) for start in range(0, len(numbers), 4)]
        runs = [self._memory.rows(place, num_layers * self._layer_bytes) for place in places]
        copy = head_rows.copy_out if kind is PageCall.OUT else head_rows.copy_in
        copy(self._cache, self._shard, range(first_layer, first_layer + num_layers), pages, runs)

    def _map(self, rest: list[int]) -> bool:
        """Whether this rank can copy to and from an arena."""
        number, offset, num_bytes, *path = rest
        try:
            memory = self._memory.open(number, to_text(path), offset, num_bytes)
        except (OSError, ValueError) as error:
            logger.warning("an arena can't be mapped: %s", error)
            return False
        return self._cache.on_cpu or self._cache.pinned.pin(memory)

    def _unmap(self, number: int) -> Landing | None:
        memory = self._memory.remove(number)
        return None if memory is None else self._cache.pinned.release(memory)
