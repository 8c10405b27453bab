"""Ends of a store's session that take long or are interrupted."""

from __future__ import annotations

import asyncio

import pytest

from halfmoon.kvstore.client import StoreClient


def close_slowly(client: StoreClient) -> asyncio.Event:
    """client.close() has work to wait for from now on. The event: it has begun to wait."""
    waiting = asyncio.Event()

    async def refuse_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            waiting.set()
            await asyncio.Event().wait()

    client._connection.spawn(refuse_to_end(), "refusing to end")
    return waiting


def hold_first_close(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The next close() of any client waits until it is cancelled, before it does anything. The event: it waits."""
    held, close = asyncio.Event(), StoreClient.close

    async def interrupted(self: StoreClient) -> None:
        if not held.is_set():
            held.set()
            await asyncio.Event().wait()
        await close(self)

    monkeypatch.setattr(StoreClient, "close", interrupted)
    return held
