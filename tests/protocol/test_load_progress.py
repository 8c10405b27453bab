"""Progress from a thread to whoever waits for it."""

from __future__ import annotations

import asyncio

from halfmoon.protocol.load_progress import ProgressFeed


async def test_who_waits_is_woken_by_the_next_report_and_by_the_end() -> None:
    feed = ProgressFeed()
    early = asyncio.create_task(feed.next(0))  # before the start knows its loop
    await asyncio.sleep(0)
    feed.start()
    await asyncio.to_thread(feed.report, "loading weights", 1, 10)
    first = await early
    assert first is not None and tuple(first.progress) == ("loading weights", 1, 10)
    waiting = [asyncio.create_task(feed.next(first.number)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    await asyncio.to_thread(feed.report, "compiling kernels", 1, 10)
    assert [found.progress.stage for found in await asyncio.gather(*waiting) if found] == ["compiling kernels"] * 2
    last = asyncio.create_task(feed.next(first.number + 1))
    await asyncio.sleep(0)
    feed.finish()
    assert await last is None and await feed.next(0) is None


async def test_a_slow_reader_gets_the_latest_and_reports_within_a_percent_are_one() -> None:
    feed = ProgressFeed()
    feed.start()

    def load() -> None:
        for done in range(1, 100_001):
            feed.report("loading weights", done, 100_000)

    await asyncio.to_thread(load)
    found = await feed.next(0)
    assert found is not None and found.progress.done == 100_000 and found.number == 101
