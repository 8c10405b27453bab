"""Files that may change while a process runs: looked at once a second, beside everything else.

look ─► times and inodes as before? ─► renew ─► refused: said once, tried again at each look, what counted before goes on
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from .errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0

Look = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles:
    """
    Args:
        what: the files hold, for the log.
        renew: reads them, at the first look and whenever they have changed. Raises ConfigError for what can't be used: half written, say.
    """

    def __init__(self, what: str, paths: Sequence[Path], renew: Callable[[], Awaitable[None]]) -> None:
        self._what = what
        self._paths = paths
        self._renew = renew
        self._seen: Look | None = None
        self._told = ""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        found = await asyncio.to_thread(self._stat)
        if found == self._seen:
            return
        try:
            await self._renew()
        except ConfigError as error:
            self._seen = None  # a file that is still being written may keep its time
            if error.message != self._told:
                logger.error("%s stay as they were: %s", self._what, error.message)
            self._told = error.message
        else:
            self._seen, self._told = found, ""

    def _stat(self) -> Look:
        return tuple(map(_time_of, self._paths))


def _time_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
