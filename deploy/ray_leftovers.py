"""Ray's processes of a start that failed. Ray itself forgets them: they would run as long as we do, beside those of the next try."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GRACE_S = 5.0  # raylet ends its own children when it is told to end


@contextmanager
def ended_if_it_fails() -> Iterator[None]:
    """What Ray starts in the block ends with it, where the block raises. That takes twice GRACE_S at most."""
    before = _of_ray()
    try:
        yield
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGKILL):
            _end(_of_ray() - before, number)
        raise


def _of_ray() -> set[int]:
    """Our children that run something out of Ray's package."""
    import ray

    folder = os.fsencode(Path(ray.__file__).parent)
    return {pid for pid in _children() if folder in _command_line(pid)}


def _children() -> set[int]:
    return {int(pid) for thread in Path("/proc/self/task").iterdir() for pid in (thread / "children").read_text().split()}


def _command_line(pid: int) -> bytes:
    """b"": it has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _end(pids: set[int], number: signal.Signals) -> None:
    """Returns when all have ended, after GRACE_S at the latest."""
    ends = select.poll()
    deadline = time.monotonic() + GRACE_S
    with contextlib.ExitStack() as opened:
        waited = set[int]()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                end = os.pidfd_open(pid)
                opened.callback(os.close, end)
                ends.register(end, select.POLLIN)
                waited.add(end)
                signal.pidfd_send_signal(end, number)
        while waited and (ended := ends.poll(max(0.0, deadline - time.monotonic()) * 1e3)):
            for end, _ in ended:
                ends.unregister(end)
                waited.discard(end)
