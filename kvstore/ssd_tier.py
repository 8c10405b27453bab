"""The tier below the arena: cached blocks that have cooled go to an SSD, and come back when they are asked for.

few slots free ─► demote: the coldest cached blocks, the end of a chain first ─► written ─► their slots are free
a prefix asked for ─► promote: read, checked, cached in the arena ─► fetched as any other          bytes that don't match: dropped
Leased, unsealed and handed-off blocks are pinned, and stay. Reads and writes are on threads; the rest belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..protocol.tasks import Tasks
from .content import ContentIndex
from .eviction import EvictionPolicy
from .slots import SlotAllocator
from .ssd_files import Record, SsdFiles

logger = logging.getLogger(__name__)

NUM_THREADS = 4  # reads and writes under way
BATCH_BLOCKS = 16  # demoted together: so many slots are held meanwhile
MAX_FAILURES = 8  # writes in a row, after which the disk is given up
RATE_WEIGHT = 0.2  # of the newest read in the mean
PATIENCE = 2.0  # times what computing takes, that a reader waits for a read
LEAST_PATIENCE_S = 0.25
UNKNOWN_PATIENCE_S = 10.0  # where it is not known what computing takes


class Promotion(NamedTuple):
    """What a caller of promote waited for."""

    wait_s: float = 0.0
    num_blocks: int = 0
    """Read for it, those that did not come in time included; 0 also where it waited for another's read as well: then wait_s says little of
    the disk."""


@dataclass(slots=True)
class _Wait:
    num_blocks: int = 0  # of its own reads
    alone: bool = True  # it has waited for no other read, and its own found what they wanted


class SsdTier:
    def __init__(
        self,
        files: SsdFiles,
        policy: EvictionPolicy,
        dram: ContentIndex,
        dram_slots: SlotAllocator,
        row: Callable[[int], np.ndarray],
        *,
        free_ratio: float,
        on_evicted: Callable[[list[bytes]], None],
        on_moved: Callable[[str, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """row(slot): a block's bytes in the arena. free_ratio: of the arena, kept free by demotion.

        on_evicted(keys): they stand on this tier no more. on_moved("demoted" | "promoted" | "dropped" | "failed", blocks).
        """
        self._files = files
        self._dram = dram
        self._dram_slots = dram_slots
        self._row = row
        self._num_wanted_free = int(free_ratio * dram_slots.num_slots)
        self._on_evicted = on_evicted
        self._on_moved = on_moved
        self._clock = clock
        self._slots = SlotAllocator(files.num_places)
        self._content = ContentIndex(self._slots, policy, lambda stored, evicted: on_evicted(evicted) if evicted else None)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store-ssd")
        self._tasks = Tasks("the store's SSD")
        self._demoting: asyncio.Task[None] | None = None
        self._promoting: dict[bytes, asyncio.Task[bool]] = {}  # the read that a key is in
        self._seconds_a_block = 0.0  # of a read, others beside it; 0: none was made
        self._num_failures = 0
        self._is_closed = False

    @property
    def num_blocks(self) -> int:
        return len(self._content)

    @property
    def num_places(self) -> int:
        return self._slots.num_slots

    def holds(self, key: bytes) -> bool:
        return self._content.slot(key) is not None

    def keys(self) -> list[bytes]:
        return self._content.keys()

    def restore(self, records: Sequence[Record]) -> None:
        """What an earlier store left, the oldest first. Before anything else is done with the tier."""
        self._slots.claim([record.place for record in records])
        self._content.add((record.key, record.place, record.checksum) for record in records)
        for record in records:
            self._content.unpin([record.place])

    # arena ─► SSD

    def look(self) -> None:
        """Slots were taken: perhaps some have to be freed."""
        if self._demoting is None and not self._is_closed and self._num_failures < MAX_FAILURES and self._num_short() > 0:
            self._demoting = self._tasks.spawn(self._demote(), "demotion", self._demotion_broke)
            self._demoting.add_done_callback(self._demoted)

    def _num_short(self) -> int:
        return min(self._num_wanted_free - self._dram_slots.num_free, self._dram_slots.num_cached)

    def _demoted(self, task: asyncio.Task[None]) -> None:
        self._demoting = None

    def _demotion_broke(self, bug: Exception) -> None:
        self._num_failures = MAX_FAILURES

    async def _demote(self) -> None:
        while not self._is_closed and self._num_failures < MAX_FAILURES and (short := self._num_short()) > 0:
            coldest = self._dram.pin_coldest(min(short, BATCH_BLOCKS))
            new = [slot for slot in coldest if not self.holds(self._dram.key(slot))]
            places = self._content.allocate(len(new)) or []
            writes = [self._write(slot, place) for slot, place in zip(new, places, strict=False)]
            written = await asyncio.gather(*writes)
            self._content.unpin(places)
            self._dram.let_go(coldest)
            self._on_moved("demoted", sum(written))

    async def _write(self, slot: int, place: int) -> bool:
        key, checksum = self._dram.key(slot), self._dram.checksum(slot)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self._files.write, place, key, checksum, self._row(slot))
        except OSError as error:
            self._failed("written", error)
            return False
        self._num_failures = 0
        self._content.add([(key, place, checksum)])
        return True

    # SSD ─► arena

    def num_worth(self, keys: Sequence[bytes], compute_s: float) -> int:
        """Leading blocks up to which reading beats computing. compute_s: of one block; 0: not known, and reading is taken to be faster."""
        if compute_s and self._seconds_a_block > compute_s:
            return next((index for index, key in enumerate(keys) if self._dram.slot(key) is None), len(keys))
        return len(keys)

    async def promote(self, keys: Sequence[bytes], compute_s: float = 0.0) -> Promotion:
        """The leading run of keys, as far as it is held and fits, stands in the arena afterwards. A block is read once for all who ask.

        Who waits gives up after PATIENCE times what computing takes; the read goes on. compute_s: of one block; 0: not known.
        """
        began, wait = self._clock(), _Wait()
        patience_s = max(PATIENCE * compute_s * len(keys), LEAST_PATIENCE_S) if compute_s else UNKNOWN_PATIENCE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._promote(keys, wait)
        return Promotion(self._clock() - began, wait.num_blocks if wait.alone else 0)

    async def _promote(self, keys: Sequence[bytes], wait: _Wait) -> None:
        while not self._is_closed:
            run = self._run(keys)
            wanted = [key for key in run if self._dram.slot(key) is None]
            if not wanted:
                return
            other = next((self._promoting[key] for key in wanted if key in self._promoting), None)
            if other is not None:
                wait.alone = False
                await asyncio.wait({other})
                continue
            wait.num_blocks += len(wanted)
            if not await self._read_all(run, wanted):
                wait.alone = False
                return

    def _run(self, keys: Sequence[bytes]) -> list[bytes]:
        run: list[bytes] = []
        for key in keys:
            if self._dram.slot(key) is None and not self.holds(key):
                break
            run.append(key)
        return run

    async def _read_all(self, run: Sequence[bytes], wanted: Sequence[bytes]) -> bool:
        """False where there is no more to be had: no room, or a block that is not what it should be."""
        held = [slot for key in run if (slot := self._dram.slot(key)) is not None]
        self._dram.pin(held)  # lest room is made by evicting what stands before the blocks
        fitting = list(wanted[: self._dram_slots.num_free + self._dram_slots.num_cached])
        slots = self._dram.allocate(len(fitting)) if fitting else []
        if not slots:
            self._dram.unpin(held)
            return False
        places = [self._place(key) for key in fitting]
        self._content.pin(places)
        # shielded, because a read that has begun writes into the slots to its end
        reading = self._tasks.start(self._finish(fitting, places, slots, held))
        self._promoting.update(dict.fromkeys(fitting, reading))
        return await asyncio.shield(reading) and len(fitting) == len(wanted)

    async def _finish(self, keys: Sequence[bytes], places: list[int], slots: list[int], held: list[int]) -> bool:
        began = self._clock()
        try:
            found = await asyncio.gather(*(self._read(place, slot) for place, slot in zip(places, slots, strict=True)))
        finally:  # also where a read broke: who waits for these keys looks again
            for key in keys:
                del self._promoting[key]
        seconds = (self._clock() - began) / len(places)
        self._seconds_a_block += (seconds - self._seconds_a_block) * (RATE_WEIGHT if self._seconds_a_block else 1.0)
        right = [(key, slot, self._content.checksum(place)) for key, place, slot, ok in zip(keys, places, slots, found, strict=True) if ok]
        wrong = [place for place, ok in zip(places, found, strict=True) if not ok]
        self._dram.add(right)
        self._content.drop(wrong)
        self._content.unpin(places)
        self._dram.unpin([*held, *slots])
        self._on_moved("promoted", len(right))
        self._on_moved("dropped", len(wrong))
        return not wrong

    async def _read(self, place: int, slot: int) -> bool:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._threads, self._files.read, place, self._content.checksum(place), self._row(slot))
            if not found:
                logger.error("place %d of the SSD does not match its checksum; the block is dropped", place)
                await loop.run_in_executor(self._threads, self._files.forget, place)
        except OSError as error:
            self._failed("read", error)
            return False
        return found

    def _place(self, key: bytes) -> int:
        place = self._content.slot(key)
        assert place is not None, "run holds keys that stand here"
        return place

    def _failed(self, what: str, error: OSError) -> None:
        self._num_failures += 1
        self._on_moved("failed", 1)
        logger.error("a block could not be %s: %s%s", what, error, "; the SSD is given up" if self._num_failures >= MAX_FAILURES else "")

    async def close(self) -> None:
        """Returns when no thread touches the arena or the disk any more. What stands on the disk stays for the next store."""
        self._is_closed = True
        if self._demoting is not None:
            await asyncio.wait({self._demoting})
        if self._promoting:
            await asyncio.wait(set(self._promoting.values()))
        await asyncio.to_thread(self._threads.shutdown)
        self._files.close()
