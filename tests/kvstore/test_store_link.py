"""StoreLink: whatever interrupts the end of a session, its channel is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from halfmoon.kvstore.access import StoreAccess
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.kvstore.store_link import StoreLink
from halfmoon.protocol.address import split_address
from halfmoon.protocol.errors import StoreUnavailable


@pytest.fixture
async def link(kv: Any, store: Any) -> StoreLink:
    link = StoreLink(store.address, StoreAccess("decode-0", kv.node, kv.schema), on_lost=lambda client: None)
    await link.attach()
    return link


def state(client: StoreClient) -> grpc.ChannelConnectivity:
    return client._connection._channel.get_state()


async def test_a_close_that_is_cancelled_closes_the_channel(link: StoreLink, store_closing: Any) -> None:
    client = link.client
    waiting = store_closing.close_slowly(client)
    await asyncio.sleep(0)  # the work has begun
    closing = asyncio.ensure_future(link.close())
    await waiting.wait()
    assert state(client) is not grpc.ChannelConnectivity.SHUTDOWN
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert state(client) is grpc.ChannelConnectivity.SHUTDOWN


async def test_a_link_that_is_closed_while_it_gives_a_lost_session_up_closes_its_channel(
    link: StoreLink, store: Any, store_closing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, giving_up = link.client, store_closing.hold_first_close(monkeypatch)
    staying = asyncio.ensure_future(link.stay_attached())
    await store.stop(0)
    await giving_up.wait()
    staying.cancel()
    await asyncio.gather(staying, return_exceptions=True)
    await link.close()
    assert state(client) is grpc.ChannelConnectivity.SHUTDOWN


@pytest.fixture
async def staying(link: StoreLink) -> AsyncIterator[StoreLink]:
    """It stays attached until the test ends."""
    task = asyncio.ensure_future(link.stay_attached())
    yield link
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await link.close()


async def test_who_knows_that_the_store_is_there_waits_for_the_session_and_others_are_told_that_there_is_none(
    staying: StoreLink, store: StoreServer, start_store: Any
) -> None:
    old, port = staying.client, split_address(store.address)[1]
    await store.stop(0)
    await old.lost.wait()
    with pytest.raises(StoreUnavailable):
        _ = staying.client
    waiting = [asyncio.ensure_future(staying.attached()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting.pop().cancel()
    again = await start_store(port=port)
    sessions = [await task for task in waiting]
    assert set(sessions) == {staying.client} and sessions[0] is not old
    assert await staying.attached() is staying.client, "nobody waits where there is a session"
    assert again.stats().num_sessions == 1


async def test_somebody_who_waits_is_not_kept_by_a_long_pause(
    staying: StoreLink, store: StoreServer, start_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause after a failed attempt would outlast the test."""
    failed = asyncio.Event()
    attach = StoreClient.attach

    async def noted(*args: Any, **kwargs: Any) -> StoreClient:
        try:
            return await attach(*args, **kwargs)
        except StoreUnavailable:
            failed.set()
            raise

    monkeypatch.setattr(StoreClient, "attach", noted)
    monkeypatch.setattr("halfmoon.kvstore.store_link.FIRST_BACKOFF_S", 86400.0)
    port = split_address(store.address)[1]
    await store.stop(0)
    await failed.wait()
    await start_store(port=port)
    await asyncio.wait_for(staying.attached(), 60)
