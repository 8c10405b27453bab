"""Which keys came and went since somebody last asked, for a feed: the whole at first, then changes.

added · removed ─► take ─► (is the whole, added, removed)        too much between two takes, or restart(): the whole again
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

MAX_PENDING = 65_536  # changes that are kept for the next take
MAX_TAKEN = 4096  # keys in one take: milliseconds to whoever reads it


class KeyChange(NamedTuple):
    is_whole: bool  # what was known before is void
    added: list[bytes]  # parents before their children
    removed: list[bytes]  # none of the added


class KeyChanges:
    """Nothing is noted before the first restart(): nobody follows. keys: all there are now, parents before their children."""

    def __init__(self, keys: Callable[[], list[bytes]]) -> None:
        self._keys = keys
        self._pending: dict[bytes, bool] = {}  # key -> whether it came, else it went; in the order in which it did
        self._rest: deque[bytes] = deque()  # of the whole, not taken yet
        self._followed = False
        self._wants_whole = False

    def restart(self) -> None:
        """The next take is the beginning of the whole."""
        self._followed = self._wants_whole = True
        self._pending.clear()

    def added(self, key: bytes) -> None:
        self._note(key, came=True)

    def removed(self, key: bytes) -> None:
        self._note(key, came=False)

    def take(self) -> KeyChange | None:
        """The next part, of at most MAX_TAKEN keys; None where there is nothing to tell."""
        is_whole, self._wants_whole = self._wants_whole, False
        if is_whole:
            self._rest = deque(self._keys())
        added = [self._rest.popleft() for _ in range(min(len(self._rest), MAX_TAKEN))]
        removed: list[bytes] = []
        if not added:  # changes come behind the whole: none overtakes what it builds on
            for key in list(islice(self._pending, MAX_TAKEN)):
                (added if self._pending.pop(key) else removed).append(key)
        return KeyChange(is_whole, added, removed) if is_whole or added or removed else None

    def _note(self, key: bytes, *, came: bool) -> None:
        if not self._followed or self._wants_whole:
            return
        self._pending.pop(key, None)  # a later change goes behind the others
        self._pending[key] = came
        if len(self._pending) > MAX_PENDING:
            self.restart()
