"""client/helper_thread: Ctrl-C at any moment of a call, and the client works on."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from halfmoon.client.helper_thread import HelperThread

INTERRUPTED_AGAIN_AND_AGAIN = """
import queue, random, signal, sys, threading, time
from halfmoon.client import Client

delays = queue.SimpleQueue()
main = threading.main_thread().ident

def interrupt():
    while True:
        time.sleep(delays.get())
        signal.pthread_kill(main, signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
client = Client(sys.argv[1])
client.models()
interrupted = 0
for _ in range(int(sys.argv[2])):
    try:
        delays.put(random.uniform(0, 0.006))
        with client.stream(prompt="x", max_tokens=8) as stream:
            for event in stream:
                pass
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        interrupted += 1
print(interrupted, client.generate(prompt="x").text)
"""


def test_a_client_answers_after_interrupts_at_any_moment(face: Any) -> None:
    command = [sys.executable, "-P", "-c", INTERRUPTED_AGAIN_AND_AGAIN, face.grpc, "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("300 The quick brown fox"), done.stdout


@pytest.fixture
def helper() -> Any:
    made = HelperThread()
    yield made
    made.close()


def test_only_the_main_threads_calls_run_elsewhere_and_one_after_another_on_one_thread(helper: HelperThread) -> None:
    first, second = helper.run(threading.get_ident), helper.run(threading.get_ident)
    assert first == second != threading.get_ident()
    found: list[tuple[int, int]] = []
    other = threading.Thread(target=lambda: found.append((helper.run(threading.get_ident), threading.get_ident())))
    other.start()
    other.join(60)
    assert found[0][0] == found[0][1]


def test_what_a_call_raises_and_returns_is_the_callers(helper: HelperThread) -> None:
    assert helper.run(divmod, 7, 2) == (3, 1) and helper.run(int, "11", base=2) == 3
    for error in (StopIteration(), KeyError("x")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            helper.run(fail)
        assert caught.value is error


def test_an_interrupted_call_ends_by_itself_and_the_next_does_not_wait_for_it(helper: HelperThread) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    main = threading.get_ident()

    def slow() -> None:
        begun.set()
        go_on.wait(60)
        ended.set()

    def interrupt() -> None:
        begun.wait(60)
        signal.pthread_kill(main, signal.SIGUSR1)

    def raises(*_: object) -> None:
        raise TimeoutError("of a handler")

    before = signal.signal(signal.SIGUSR1, raises)
    try:
        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        with pytest.raises(TimeoutError):
            helper.run(slow)
        interrupting.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert helper.run(lambda: 5) == 5 and not ended.is_set()
    go_on.set()
    assert ended.wait(60)


def test_a_client_that_is_dropped_leaves_no_thread() -> None:
    helper = HelperThread()
    worker = helper.run(threading.current_thread)
    del helper
    worker.join(60)
    assert not worker.is_alive()
