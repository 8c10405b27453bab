from __future__ import annotations

import asyncio

import pytest

from halfmoon.kvstore.streams import WholeWrites
from halfmoon.kvstore.waiters import Waiters, until_ended
from halfmoon.protocol.errors import HalfmoonError, HandoffAborted


async def test_notify_wakes_everyone_on_its_key_and_nobody_else() -> None:
    waiters, loop = Waiters(), asyncio.get_running_loop()
    mine = [asyncio.ensure_future(waiters.wait("a", float("inf"))) for _ in range(3)]
    other = asyncio.ensure_future(waiters.wait("b", loop.time() + 0.05))
    await asyncio.sleep(0)
    assert waiters.num_waiting("a") == 3
    waiters.notify("a")
    assert await asyncio.gather(*mine) == [True] * 3
    assert not other.done() and await other is False
    assert waiters.num_waiting("a") == waiters.num_waiting("b") == 0 and not waiters._waiting


async def test_a_deadline_in_the_past_does_not_wait() -> None:
    assert await Waiters().wait("a", asyncio.get_running_loop().time() - 1) is False


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    waiters = Waiters()
    waiting = asyncio.ensure_future(waiters.wait("a", float("inf")))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not waiters._waiting
    waiters.notify("a")


async def test_work_is_dropped_when_its_lease_ends() -> None:
    ended: asyncio.Future[HalfmoonError | None] = asyncio.get_running_loop().create_future()
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    waiting = asyncio.ensure_future(until_ended(work(), ended))
    await asyncio.sleep(0.01)
    ended.set_result(HandoffAborted("gone"))
    with pytest.raises(HandoffAborted, match="gone"):
        await waiting
    assert cleaned == [True]


async def test_work_that_is_done_first_gives_its_result() -> None:
    ended: asyncio.Future[HalfmoonError | None] = asyncio.get_running_loop().create_future()
    assert await until_ended(asyncio.sleep(0, "done"), ended) == "done"
    ended.set_result(None)
    assert await until_ended(asyncio.sleep(60, "late"), ended) is None


async def test_work_whose_message_is_on_its_way_is_dropped_behind_it() -> None:
    """gRPC takes no status for a call while a message of it is being written."""
    written, going, order = asyncio.Event(), asyncio.Event(), list[str]()

    class Stream:
        async def write(self, message: str) -> None:
            going.set()
            await written.wait()
            order.append(message)

    writes = WholeWrites(Stream())

    async def send() -> None:
        while True:
            await writes.write("sent whole")

    ended: asyncio.Future[HalfmoonError | None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(until_ended(send(), ended, writes.close))
    await going.wait()
    ended.set_result(HandoffAborted("given up"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    written.set()
    with pytest.raises(HandoffAborted):
        await waiting
    assert order == ["sent whole"]
