from __future__ import annotations

import asyncio
import threading

import pytest

from halfmoon.engine.executor import DeviceLost
from halfmoon.engine.worker_life import WorkerAddress, WorkerLife
from halfmoon.protocol.errors import MachineError


@pytest.fixture
def life() -> WorkerLife:
    address = WorkerAddress(
        worker_id="decode-0", node_id="node-a", host="127.0.0.1", store_address="127.0.0.1:1", proxy_address="127.0.0.1:2"
    )
    return WorkerLife(address, lambda lost: None)


async def test_what_is_loaded_is_given_and_what_it_raises_is_raised(life: WorkerLife) -> None:
    assert await life.load(lambda: 7) == 7

    def fails() -> None:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        await life.load(fails)


async def test_a_worker_that_breaks_while_it_loads_says_why_and_waits_for_no_thread(life: WorkerLife) -> None:
    """A rank that ends leaves the others in a call to the group."""
    loading, gate = threading.Event(), threading.Event()

    def hangs() -> None:
        loading.set()
        gate.wait(60)

    start = asyncio.ensure_future(life.load(hangs))
    await asyncio.to_thread(loading.wait)
    life.crashed(DeviceLost("rank 1 of 2 (process 7) was killed by SIGKILL"))
    try:
        with pytest.raises(MachineError, match="decode-0 did not start: rank 1 of 2"):
            await asyncio.wait_for(start, 30)
    finally:
        gate.set()
