"""What came to a worker's pages and went, as its Join stream tells it. KeyChanges, numbered and under the lock."""

from __future__ import annotations

import threading

from ..protocol.v1 import control_pb2
from .key_changes import KeyChanges


class PrefixFeed:
    """changed: guards the changes."""

    def __init__(self, changes: KeyChanges, changed: threading.Condition) -> None:
        self._changes = changes
        self._changed = changed
        self._number = 0

    def restart(self) -> None:
        """The next take begins with the whole, as of a new stream."""
        with self._changed:
            self._changes.restart()

    def take(self) -> control_pb2.PrefixChange | None:
        with self._changed:
            change = self._changes.take()
        if change is None:
            return None
        self._number = 1 if change.is_whole else self._number + 1
        return control_pb2.PrefixChange(number=self._number, whole=change.is_whole, added=change.added, removed=change.removed)
