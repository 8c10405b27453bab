"""TransferThread on CPU."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest
import torch

from halfmoon.engine.transfer import TransferThread


@pytest.fixture
def crashes() -> list[BaseException]:
    return []


@pytest.fixture
def transfer(crashes: list[BaseException]) -> TransferThread:
    return TransferThread("transfer", torch.device("cpu"), crashes.append)


async def test_calls_run_one_after_the_other_in_the_order_they_came(transfer: TransferThread) -> None:
    seen: list[tuple[int, str]] = []
    for index in range(50):
        transfer.submit(lambda index=index: seen.append((index, threading.current_thread().name)))
    await transfer.drained()
    assert [index for index, _ in seen] == list(range(50))
    assert len({name for _, name in seen}) == 1
    transfer.close()


async def test_a_call_that_is_not_waited_for_any_more_ends_before_drained_does(transfer: TransferThread) -> None:
    begun, go, over = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go.wait(60.0)
        over.set()

    waiting = asyncio.create_task(transfer.run(call))
    await asyncio.to_thread(begun.wait, 5.0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    drained = asyncio.create_task(transfer.drained())
    go.set()
    await drained
    assert over.is_set()
    transfer.close()


async def test_a_submitted_call_that_raises_is_told_and_does_not_stop_the_thread(
    transfer: TransferThread, crashes: list[BaseException]
) -> None:
    transfer.submit(lambda: int("x") and None)
    await transfer.drained()
    assert [type(error) for error in crashes] == [ValueError]
    with pytest.raises(ValueError):
        await transfer.run(lambda: partial(int, "y"))  # told to who waits, and to nobody else
    assert len(crashes) == 1
    transfer.close()


async def test_what_a_call_left_to_do_is_done_before_the_next_call_on_a_cpu(transfer: TransferThread) -> None:
    seen: list[str] = []

    def call(name: str):
        seen.append(name)
        return lambda: seen.append(f"{name} landed")

    for name in ("a", "b"):
        transfer.submit(partial(call, name))
    await transfer.drained()
    assert seen == ["a", "a landed", "b", "b landed"]
    transfer.close()
