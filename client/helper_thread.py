"""Ctrl-C and gRPC: why a call of the main thread runs on a helper thread.

Python raises KeyboardInterrupt in the main thread between any two instructions. gRPC's blocking calls hold a threading.Condition, and a
`with` of one is not safe there: the lock can stay taken. The channel's own thread then waits for it for ever, and so does every later call
of the client. So the main thread waits on a SimpleQueue, which is one instruction, and a thread that no signal reaches does the call.

main thread ── run(next, call) ─► helper thread ── next(call) ─► gRPC
     ▲                                  │
     └───────── SimpleQueue ◄───────────┘
other threads: the call itself, for no signal reaches them
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


WAKE_S = 0.1  # a signal that comes just before the wait wakes nobody: Python looks for it when the wait ends


class _Outcome(NamedTuple):
    result: Any
    error: BaseException | None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


class _Helper:
    """A thread that makes one call after another until it is told to end."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="halfmoon-client", daemon=True).start()

    def run(self, function: Callable[[], Any]) -> _Outcome:
        outcomes: SimpleQueue[_Outcome] = SimpleQueue()

        def call() -> None:
            try:
                outcomes.put(_Outcome(function(), None))
            except BaseException as error:  # raised again in the thread that asked
                outcomes.put(_Outcome(None, error))

        self._calls.put(call)
        while True:
            try:
                return outcomes.get(timeout=WAKE_S)
            except Empty:
                pass

    def end(self) -> None:
        """After the call under way."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


class HelperThread:
    """Makes the main thread's calls. After an interrupt the call under way ends by itself, unheard, and the next has a new thread."""

    def __init__(self) -> None:
        self._idle: list[_Helper] = []

    def run(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """Raises what the function raises."""
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        helper = self._idle.pop() if self._idle else _Helper()
        try:
            outcome = helper.run(lambda: function(*args, **kwargs))
        except BaseException:  # of a signal's handler
            helper.end()
            raise
        self._idle.append(helper)
        return outcome.get()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().end()

    def __del__(self) -> None:
        self.close()
