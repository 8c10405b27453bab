"""Which store holds which block: block key -> stores, from the stores' Watch streams, together with promised blocks.
A second index says in which worker's pages a block stands: there a "store" is a worker, by its id.

key ─► 0b0101        bit i: the store at slot i holds it. A store's longest leading run ends where its bit is first unset.

A prompt's first exact_blocks keys are looked up one by one. After them the ends of the runs are found by bisection: a store evicts
the end of a chain before its start (kvstore/content.py), so its bit stays unset once it is unset. This may fail for a while, when a
corrupt block was dropped or a promise outlived the blocks before it. Then an answer beyond exact_blocks may be too long, and a worker
that finds less at the store computes the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, repeat

import numpy as np
from numpy.typing import NDArray

from ...protocol.leading_run import NUM_EXACT, leading_run
from .promises import TTL_S, Promises
from .ssd_blocks import SsdBlocks

MAX_COPIES = 4_000_000
PART_BLOCKS = 4096  # some milliseconds
MANY_STORES = 16  # with more, numpy finds the bits


class PrefixIndex:
    """Plain ints and bytes without I/O, so that the simulator can use it too.

    Args:
        max_copies: limit of the table. Each known block counts once for each store that holds it (about 160 bytes, and 110 for each
            further store). A store whose content does not fit is cut: nothing new is learnt of it until a fresh replace, so that
            what is known of it remains leading runs.
        clock: in seconds; read only while something is promised.
        exact_blocks: number of keys looked up one by one, at least 1.
        part_blocks: blocks changed in one go when a store's whole content comes or goes.
    """

    def __init__(
        self,
        *,
        max_copies: int = MAX_COPIES,
        clock: Callable[[], float] = time.monotonic,
        promise_ttl_s: float = TTL_S,
        exact_blocks: int = NUM_EXACT,
        part_blocks: int = PART_BLOCKS,
    ) -> None:
        self.num_copies = 0
        self._max_copies = max_copies
        self._exact_blocks = exact_blocks
        self._part_blocks = part_blocks
        self._holders: dict[bytes, int] = {}
        self._slots: dict[str, int] = {}  # store address -> its bit's position
        self._stores: dict[int, str] = {}  # the other way round
        self._name_array: NDArray[np.object_] | None = None  # of _stores, by slot; None: a store came or went
        self._held: dict[int, set[bytes]] = {}  # slot -> what the store there holds
        self._retired: dict[int, set[bytes]] = {}  # of stores dropped, not cleared yet
        self._live = 0  # the bits that count
        self._cut: set[str] = set()
        self._masks_of: tuple[Sequence[str], int] | None = None  # stores last counted among, and their bits; None: a store came or went
        self.on_change: Callable[[Sequence[bytes], Sequence[bytes]], None] | None = None
        """Is told of blocks that some store holds and none did before, and of those that none holds any more."""
        self._new: list[bytes] = []
        self._gone: list[bytes] = []
        self._promises = Promises(clock, promise_ttl_s)
        self._on_ssd = SsdBlocks()

    def __len__(self) -> int:
        """Distinct known blocks. Those of a large dropped store disappear in parts, with later changes."""
        return len(self._holders)

    def replace(self, store: str, keys: Sequence[bytes], on_ssd: Iterable[bytes] = ()) -> None:
        """Replaces all that is known of the store by its whole content. Promises stay. on_ssd: of keys, those on SSD alone."""
        for _ in self.replace_in_parts(store, keys, on_ssd):
            pass

    def replace_in_parts(self, store: str, keys: Sequence[bytes], on_ssd: Iterable[bytes] = ()) -> Iterator[None]:
        """The same in parts, so that an event loop can serve others in between. If it is ended early, only a part is known."""
        held = self._held[self._slot(store)]
        self._cut.discard(store)
        self._on_ssd.replace(store, on_ssd)
        stale = list(held.difference(keys)) if held else []
        for first in range(0, len(stale), self._part_blocks):
            self.change(store, (), stale[first : first + self._part_blocks])
            yield
        for first in range(0, len(keys), self._part_blocks):
            self.change(store, keys[first : first + self._part_blocks], ())
            yield

    def change(
        self,
        store: str,
        stored: Iterable[bytes],
        evicted: Sequence[bytes],
        demoted: Sequence[bytes] = (),
        promoted: Sequence[bytes] = (),
    ) -> None:
        """A key that is both stored and evicted counts as held. demoted: on SSD alone from now on; promoted: in DRAM again."""
        slot = self._slot(store)
        self._sweep()
        if self._on_ssd or demoted:
            self._on_ssd.remove(store, evicted, promoted)
            self._on_ssd.add(store, demoted)
        self._clear(self._held[slot], 1 << slot, evicted)
        if self._promises.stores:
            stored = list(stored)
            self._promises.confirm(slot, stored)
        if store in self._cut:
            self._tell()
            return
        holders, held, bit, told = self._holders, self._held[slot], 1 << slot, self.on_change
        before = len(held)
        room = before + self._max_copies - self.num_copies
        for key in stored:
            if len(held) >= room and key not in held:
                self._cut.add(store)
                break
            known = holders.get(key)
            if known is None and told is not None:
                self._new.append(key)
            holders[key] = bit if known is None else known | bit  # one int for all the blocks of one holder
            held.add(key)
        self.num_copies += len(held) - before
        self._tell()

    def drop(self, store: str) -> None:
        """Forgets the store and its promises: it is gone, or its content is no longer known."""
        slot = self._slots.pop(store, None)
        if slot is not None:
            self._live &= ~(1 << slot)
            self._retired[slot] = self._held.pop(slot)
            self._promises.forget(slot)
            self._on_ssd.drop(store)
            self._cut.discard(store)
            del self._stores[slot]
            self._name_array = self._masks_of = None
            self._sweep()
            self._tell()

    def expect(self, store: str, keys: Sequence[bytes]) -> None:
        """Promises that the store will hold keys, a chain from its start. They count as held until the store confirms them,
        withdraw takes them back, or promise_ttl_s has passed. Does nothing for an unknown store."""
        slot = self._slots.get(store)
        if slot is not None:
            new = keys[leading_run(keys, self._held[slot].__contains__, self._exact_blocks) :]
            if new:
                self._promises.expire()
                self._promises.add(slot, new)

    def withdraw(self, store: str, keys: Sequence[bytes]) -> None:
        """Takes back one expect of these keys."""
        slot = self._slots.get(store)
        if slot is not None and keys:
            self._promises.withdraw(slot, keys[-1])

    def is_cut(self, store: str) -> bool:
        """True if not all of the store's content is known because the table is full."""
        return store in self._cut

    def has_room(self) -> bool:
        """True if there is so much room that reading a cut store's content again is worthwhile."""
        return self.num_copies <= 0.9 * self._max_copies

    def holders(self, key: bytes) -> list[str]:
        """The stores that hold a block, without promises."""
        return self._names(self._holders.get(key, 0) & self._live)

    def promised(self, key: bytes) -> list[str]:
        """The stores that a block is promised to."""
        self._promises.expire()
        return self._names(self._promises.stores.get(key, 0) & self._live)

    def num_held(self, key: bytes, stores: Sequence[str]) -> int:
        """How many of the stores hold a block, or will by what was promised. Cheap while stores is the very same object."""
        self._promises.expire()
        return (self._mask(key) & self._bits_of(stores)).bit_count()

    def is_held(self, key: bytes) -> bool:
        """By any store, promises left out."""
        return bool(self._holders.get(key, 0) & self._live)

    def leading_runs(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Store address -> number of leading keys that it holds or is promised. Leaves out stores with none."""
        self._promises.expire()
        runs: dict[str, int] = {}
        held = self._live if keys else 0  # by all the keys so far
        for num_blocks, holders in enumerate(self._masks(keys)):
            still = held & holders
            if num_blocks and still != held:
                self._note(runs, held & ~still, num_blocks)
            held = still
            if not held:
                return runs
        if held:
            self._note_ends(runs, held, keys)
        return runs

    def ssd_runs(self, keys: Sequence[bytes], runs: Mapping[str, int]) -> dict[str, int]:
        """Store address -> of the leading run that leading_runs said, the blocks at its end that stand on SSD alone. Leaves out 0."""
        if not self._on_ssd:
            return {}
        found = ((store, self._on_ssd.num_behind(store, keys, num_held)) for store, num_held in runs.items())
        return {store: num_blocks for store, num_blocks in found if num_blocks}

    def _masks(self, keys: Sequence[bytes]) -> Iterable[int]:
        """The masks of the first exact_blocks keys."""
        first = islice(keys, self._exact_blocks)
        if not self._promises.stores:
            return map(self._holders.get, first, repeat(0))
        return map(self._mask, first)

    def _mask(self, key: bytes) -> int:
        return self._holders.get(key, 0) | self._promises.stores.get(key, 0)

    def _note_ends(self, runs: dict[str, int], held: int, keys: Sequence[bytes]) -> None:
        """Notes where the runs end of the stores that hold the first exact_blocks keys."""
        first = min(self._exact_blocks, len(keys))
        while first < len(keys) and self._mask(keys[-1]) & held != held:
            last = len(keys) - 1  # not held by all of them; so is every key after the end of a run
            while first < last:
                middle = (first + last) // 2
                if self._mask(keys[middle]) & held == held:
                    first = middle + 1
                else:
                    last = middle
            still = held & self._mask(keys[first])
            self._note(runs, held & ~still, first)
            if not still:
                return
            held, first = still, first + 1
        self._note(runs, held, len(keys))

    def _note(self, runs: dict[str, int], bits: int, num_blocks: int) -> None:
        runs.update(dict.fromkeys(self._names(bits), num_blocks))

    def _bits_of(self, stores: Sequence[str]) -> int:
        if self._masks_of is None or self._masks_of[0] is not stores:
            bits = 0
            for store in stores:
                slot = self._slots.get(store)
                bits |= 0 if slot is None else 1 << slot
            self._masks_of = stores, bits
        return self._masks_of[1]

    def _names(self, bits: int) -> list[str]:
        if bits.bit_count() > MANY_STORES:
            return self._many_names(bits)
        names: list[str] = []
        stores = self._stores
        while bits:
            lowest = bits & -bits
            names.append(stores[lowest.bit_length() - 1])
            bits ^= lowest
        return names

    def _many_names(self, bits: int) -> list[str]:
        if self._name_array is None:
            self._name_array = np.array([self._stores.get(slot, "") for slot in range(max(self._stores) + 1)], object)
        places = np.frombuffer(bits.to_bytes(bits.bit_length() // 8 + 1, "little"), np.uint8)
        return self._name_array[np.flatnonzero(np.unpackbits(places, bitorder="little"))].tolist()

    def _clear(self, held: set[bytes], bit: int, keys: Iterable[bytes]) -> None:
        holders, before = self._holders, len(held)
        for key in keys:
            if key in held:
                held.remove(key)
                left = holders[key] & ~bit
                if left:
                    holders[key] = left
                else:
                    del holders[key]
                    if self.on_change is not None:
                        self._gone.append(key)
        self.num_copies -= before - len(held)

    def _tell(self) -> None:
        if self.on_change is not None and (self._new or self._gone):
            new, gone, self._new, self._gone = self._new, self._gone, [], []
            self.on_change(new, gone)

    def _sweep(self) -> None:
        """Removes a part of a dropped store's blocks from the table. Its slot is free once all are removed."""
        if self._retired:
            slot, held = next(iter(self._retired.items()))
            self._clear(held, 1 << slot, list(islice(held, self._part_blocks)))
            if not held:
                del self._retired[slot]

    def _slot(self, store: str) -> int:
        slot = self._slots.get(store)
        if slot is None:
            taken = self._stores.keys() | self._retired.keys()
            slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
            self._slots[store], self._stores[slot], self._held[slot] = slot, store, set()
            self._live |= 1 << slot
            self._name_array = self._masks_of = None
        return slot
