"""The thread that runs an engine, step after step, and sleeps while there is nothing to do.

with loop.changed: scheduler.…; notify ─► schedule (under the lock) ─► run ─► schedule ─► … ─► None: sleep
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

StepT = TypeVar("StepT")


class StepLoop(ABC, Generic[StepT]):
    """on_crash: told, on this thread, what schedule or run raised; no step follows."""

    def __init__(self, name: str, on_crash: Callable[[BaseException], None]) -> None:
        self.changed = threading.Condition()  # guards the scheduler; notified when there may be a step
        self._on_crash = on_crash
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    @abstractmethod
    def schedule(self) -> StepT | None:
        """With `changed` held: the next step, or None where there is none now."""

    @abstractmethod
    def run(self, step: StepT) -> None:
        """Without it."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for the step under way."""
        with self.changed:
            self._stopping = True
            self.changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while (step := self._next()) is not None:
                self.run(step)
        except Exception as error:  # the thread's boundary: the event loop has to hear of it, or every call would hang
            logger.exception("%s broke", self._thread.name)
            self._on_crash(error)

    def _next(self) -> StepT | None:
        """Sleeps until there is one; None when stopping."""
        with self.changed:
            while not self._stopping:
                step = self.schedule()
                if step is not None:
                    return step
                self.changed.wait()
        return None
