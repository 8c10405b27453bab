"""The processes of a worker's other ranks, as rank 0 holds them. One that ends takes the group with it, and is told of in words.

rank 0 ── standard input: open as long as rank 0 lives, and ends with it        ─► rank 1, 2 …
       ── steps: one message a step, on the step loop's thread                  ─►
       ── pages: copies of blocks, in their order ─►   ◄─ each one that is over, or what broke the rank; its end is the rank's end
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..executor import DeviceLost
from .link import Link, to_text

logger = logging.getLogger(__name__)

DONE, FAILED = 0, 1  # what a rank says of pages: [DONE, number of the call, whether it went well], [FAILED, text …]
MODULE = "halfmoon.engine.ranks.process"


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    steps: Link
    pages: Link
    watcher: threading.Thread | None = None
    num_done: int = 0  # calls of pages, which are done in their order


class RankProcesses:
    """Any thread, where nothing else is said.

    Args:
        starts: what each rank has to know, from rank 1 on; see process.py.
        handle: of a file that they share; each finds it open under this number.
        on_lost: told once, on a thread, when a rank has ended by itself.
    """

    def __init__(
        self, starts: list[dict[str, Any]], environments: list[dict[str, str]], handle: int, on_lost: Callable[[DeviceLost], None]
    ) -> None:
        self._on_lost = on_lost
        self._changed = threading.Condition()  # guards what follows
        self._is_ending = False
        self._causes: list[str] = []  # what ranks said of their failure, the first first
        self._refused: set[int] = set()  # calls of pages that did not go well
        self._num_calls = 0
        self._ranks: list[_Rank] = []
        for number, (start, environment) in enumerate(zip(starts, environments, strict=True), 1):
            self._ranks.append(_spawn(number, start, environment, handle))
        for rank in self._ranks:
            rank.watcher = threading.Thread(target=self._watch, args=(rank,), name=f"rank-{rank.number}-watcher", daemon=True)
            rank.watcher.start()

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def wait_started(self) -> None:
        """Until each rank runs and knows the model's configuration. Raises DeviceLost."""
        for rank in self._ranks:
            if rank.steps.receive() is None:
                raise self.lost()

    def step(self, message: list[int]) -> None:
        """On the step loop's thread, as answers. Raises DeviceLost."""
        self._send([rank.steps for rank in self._ranks], message)

    def answers(self) -> list[list[int]]:
        """Of each rank to what was asked. Raises DeviceLost."""
        found = [rank.steps.receive() for rank in self._ranks]
        if None in found:
            raise self.lost()
        return [answer for answer in found if answer is not None]

    def call(self, kind: int, message: list[int]) -> int:
        """Asks each rank to copy pages; calls are carried out in their order. Returns the call's number. One thread. Raises DeviceLost."""
        self._num_calls += 1
        self._send([rank.pages for rank in self._ranks], [kind, self._num_calls, *message])
        return self._num_calls

    def wait(self, number: int) -> bool:
        """Until every rank has carried the call out; whether all could.

        Raises DeviceLost where a rank has ended: then all have, and nobody copies any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_ending or all(rank.num_done >= number for rank in self._ranks))
            if all(rank.num_done >= number for rank in self._ranks):
                return number not in self._refused
        raise self.lost()

    def lost(self, error: BaseException | None = None) -> DeviceLost:
        """Ends every rank, waits for that, and says why the group is lost. error: what rank 0 saw of it. Not on a watcher's thread."""
        self._end()
        for rank in self._ranks:
            if rank.watcher is not None:
                rank.watcher.join()
        return self._why(error)

    def close(self) -> None:
        """The ranks end. Idempotent."""
        self._end()
        for rank in self._ranks:
            if rank.watcher is not None:
                rank.watcher.join()
            rank.steps.close()
            rank.pages.close()

    def _send(self, links: list[Link], message: list[int]) -> None:
        try:
            for link in links:
                link.send(message)
        except OSError as error:
            raise self.lost(error) from error

    def _watch(self, rank: _Rank) -> None:
        while (message := rank.pages.receive()) is not None:
            kind, *rest = message
            with self._changed:
                if kind == FAILED:
                    self._causes.append(f"rank {rank.number} of {len(self._ranks) + 1} failed: {to_text(rest)}")
                else:
                    number, went_well = rest
                    rank.num_done = number
                    self._refused.update(() if went_well else (number,))
                self._changed.notify_all()
        code = rank.process.wait()
        with self._changed:
            is_first = not self._is_ending
            if code < 0:
                name = signal.Signals(-code).name
                killed = f"rank {rank.number} of {len(self._ranks) + 1} (process {rank.process.pid}) was killed by {name}"
                self._causes.insert(0, killed)  # what others say of it is that they lost their peer
            elif is_first and not self._causes:
                self._causes.append(f"rank {rank.number} of {len(self._ranks) + 1} ended with {code}")
        if is_first:
            self._end()
            self._on_lost(self._why(None))

    def _end(self) -> None:
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        for rank in self._ranks:
            if rank.process.stdin is not None and not rank.process.stdin.closed:
                rank.process.stdin.close()

    def _why(self, error: BaseException | None) -> DeviceLost:
        with self._changed:
            if self._causes:
                return DeviceLost(self._causes[0])
        reason = "its ranks were ended" if error is None else f"{type(error).__name__}: {error}"
        return DeviceLost(f"rank 0 of {len(self._ranks) + 1} failed, and its group with it: {reason}")


def _spawn(number: int, start: dict[str, Any], environment: dict[str, str], handle: int) -> _Rank:
    (steps, its_steps), (pages, its_pages) = socket.socketpair(), socket.socketpair()
    told = {**start, "steps": its_steps.fileno(), "pages": its_pages.fileno(), "memory": handle}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE, json.dumps(told)],
        stdin=subprocess.PIPE,
        pass_fds=(its_steps.fileno(), its_pages.fileno(), handle),
        env={**os.environ, **environment},
    )
    its_steps.close()
    its_pages.close()
    return _Rank(number, process, Link(steps), Link(pages))
