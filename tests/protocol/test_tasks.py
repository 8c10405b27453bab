"""Work beside a call: it is never lost, and what breaks it is never swallowed."""

from __future__ import annotations

import asyncio
import logging

import pytest

from halfmoon.protocol.tasks import Tasks


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
