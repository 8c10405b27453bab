"""Finds prefixes that are requested so often that more stores should hold them. Pure: the caller passes the time.

placements ─► hits of a leading run, over a sliding window ─► longest hot run ─► next_copy ─► Copy: from a holder to the least loaded
store without it

Runs are counted at some depths only, each a quarter deeper than the one before. So a placement updates about 30 counters however
long its prompt is, and a hot run may be copied up to a fifth too short.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

WINDOW_S = 60.0
HITS_A_COPY = 16  # within the window; a prefix deserves one more copy for each so many
MIN_TOKENS = 512  # of a run worth a copy
MAX_TRACKED = 65_536  # runs counted in one window; with more the window ends early


def _depths() -> tuple[int, ...]:
    depths: list[int] = []
    depth = 1
    while depth < 2**21:
        depths.append(depth)
        depth = max(depth + 1, depth * 5 // 4)
    return tuple(depths)


DEPTHS = _depths()


class HotRun(NamedTuple):
    num_blocks: int
    num_hits: float  # within the window


class Copy(NamedTuple):
    source: str  # store addresses
    target: str
    keys: Sequence[bytes]


class HotPrefixes:
    """Counts hits in the present window, plus the part of the window before that a sliding window would still cover."""

    def __init__(self, window_s: float = WINDOW_S, hits_a_copy: int = HITS_A_COPY, max_tracked: int = MAX_TRACKED) -> None:
        self._window_s = window_s
        self._hits_a_copy = hits_a_copy
        self._max_tracked = max_tracked
        self._began_s = 0.0
        self._hits: dict[bytes, int] = {}
        self._hits_before: dict[bytes, int] = {}

    def hit(self, keys: Sequence[bytes], min_blocks: int, now_s: float) -> HotRun | None:
        """Counts a placement of keys. Returns the longest hot leading run of at least min_blocks, this placement included."""
        self._turn(now_s)
        share = max(0.0, 1.0 - (now_s - self._began_s) / self._window_s)  # of the window before that still counts
        hits, before = self._hits, self._hits_before
        hot: HotRun | None = None
        for depth in DEPTHS:
            if depth > len(keys):
                break
            if depth >= min_blocks:
                key = keys[depth - 1]
                count = hits[key] = hits.get(key, 0) + 1
                num_hits = count + share * before.get(key, 0)
                if num_hits >= self._hits_a_copy:
                    hot = HotRun(depth, num_hits)
        return hot

    def num_copies(self, hot: HotRun) -> int:
        """How many stores should hold it: one, and one more for each hits_a_copy hits."""
        return 1 + int(hot.num_hits // self._hits_a_copy)

    def _turn(self, now_s: float) -> None:
        age_s = now_s - self._began_s
        if age_s < self._window_s and len(self._hits) < self._max_tracked:
            return
        self._hits_before = self._hits if age_s < 2 * self._window_s else {}
        self._hits = {}
        self._began_s = now_s if age_s < self._window_s else now_s - age_s % self._window_s


def next_copy(
    keys: Sequence[bytes],
    num_copies: int,
    *,
    holders: Collection[str],
    coming: Collection[str],
    load_of: Mapping[str, float],
    copies_from: Mapping[str, int],
    avoid: Collection[str] = (),
) -> Copy | None:
    """The next copy of a run, or None if there are enough copies, no holder, or no store to take one.

    Only copies at the stores in load_of count, because prefills read there. A decode worker's store also holds what was handed off to it.

    Args:
        holders: stores that hold the run. coming: stores that will hold it, by a promise or a copy under way.
        load_of: load of each store on the node of a worker that prefills. copies_from: number of copies under way, by source.
        avoid: stores that recently failed to take the run.
    """
    taken = {*holders, *coming}
    if not holders or len(taken & load_of.keys()) >= num_copies:
        return None
    taken.update(avoid)
    free = [(load, store) for store, load in load_of.items() if store not in taken]
    if not free:
        return None
    idle = [store for store in holders if not copies_from.get(store)]
    source = min(idle) if idle else min(holders, key=lambda store: (copies_from[store], store))
    return Copy(source, min(free)[1], keys)


class Budget:
    """A rate in bytes a second, with bursts of one second's worth. A larger amount is admitted and paid for afterwards."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._left = bytes_per_s
        self._at_s = 0.0

    def has_left(self, now_s: float) -> bool:
        self._left = min(self._bytes_per_s, self._left + (now_s - self._at_s) * self._bytes_per_s)
        self._at_s = now_s
        return self._left > 0

    def take(self, num_bytes: int) -> None:
        """To be asked first whether any is left."""
        self._left -= num_bytes
