"""Work beside a call: it is never lost, and what breaks it is never swallowed."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from halfmoon.protocol.errors import InvalidRequest, StoreUnavailable
from halfmoon.protocol.tasks import Tasks, beside, untaken


async def test_an_unexpected_exception_is_logged_with_its_traceback_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tasks, told = Tasks("the owner"), []
    started = asyncio.Event()

    async def break_off() -> None:
        started.set()
        raise RuntimeError("a bug")

    with caplog.at_level(logging.ERROR):
        task = tasks.spawn(break_off(), "its work", told.append)
        await asyncio.wait({task})
        await asyncio.sleep(0)
    assert [str(error) for error in told] == ["a bug"] and len(tasks) == 0
    (record,) = caplog.records
    assert record.getMessage() == "the owner: its work failed: a bug"
    assert record.exc_info is not None and record.exc_info[2] is not None


async def test_close_gives_grace_then_cancels_and_returns_when_all_has_ended() -> None:
    tasks, ended, hold = Tasks("the owner"), [], asyncio.Event()

    async def work(name: str, until: asyncio.Event) -> None:
        try:
            await until.wait()
        finally:
            ended.append(name)

    quick = asyncio.Event()
    tasks.spawn(work("quick", quick), "quick")
    tasks.spawn(work("endless", hold), "endless", lambda _: ended.append("never"))
    asyncio.get_running_loop().call_soon(quick.set)
    await tasks.close(grace_s=0.05)
    await asyncio.sleep(0)
    assert ended == ["quick", "endless"] and len(tasks) == 0


async def test_an_error_of_the_tree_is_logged_in_its_words_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks("the owner")

    async def refuse() -> None:
        raise InvalidRequest("no such thing")

    with caplog.at_level(logging.ERROR):
        await asyncio.wait({tasks.spawn(refuse(), "its work")})
        await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.getMessage() == "the owner: its work failed: no such thing" and not record.exc_info


async def test_work_beside_a_block_ends_with_it_whatever_ends_either(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    async def endless(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)
            raise RuntimeError("on its way out")

    async with beside(endless("left")):
        await asyncio.sleep(0)
    with pytest.raises(KeyError):
        async with beside(endless("broken off")):
            await asyncio.sleep(0)
            raise KeyError
    assert ended == ["left", "broken off"]
    async with beside(asyncio.sleep(0, "found")) as task:
        assert await task == "found"
    gc.collect()
    assert caplog.records == [], "asyncio complains of no exception that nobody took"


async def test_of_what_nobody_takes_any_more_only_a_bug_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(error: Exception) -> None:
        raise error

    tasks = Tasks("a store")
    for error in (StoreUnavailable("it is gone"), ValueError("a bug")):
        task = tasks.start(fail(error))
        task.add_done_callback(untaken)
        await asyncio.wait({task})
    assert [record.getMessage() for record in caplog.records] == ["nobody waited for what failed: a bug"]
    assert caplog.records[0].exc_info is not None
