"""StoreLink: whatever interrupts the end of a session, its channel is closed."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.store_link import StoreLink


@pytest.fixture
async def link(kv: Any, store: Any) -> StoreLink:
    link = StoreLink(
        store.address, client_id="decode-0", node_id=kv.node, schema=kv.schema, transport="auto", on_lost=lambda client: None
    )  # fmt: skip
    await link.attach()
    return link


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


def state(client: StoreClient) -> grpc.ChannelConnectivity:
    return client._connection._channel.get_state()


async def test_a_close_that_is_cancelled_closes_the_channel(link: StoreLink) -> None:
    client = link.client
    waiting = close_slowly(client)
    await asyncio.sleep(0)  # the work has begun
    closing = asyncio.ensure_future(link.close())
    await waiting.wait()
    assert state(client) is not grpc.ChannelConnectivity.SHUTDOWN
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert state(client) is grpc.ChannelConnectivity.SHUTDOWN


async def test_a_link_that_is_closed_while_it_gives_a_lost_session_up_closes_its_channel(
    link: StoreLink, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, giving_up = link.client, asyncio.Event()
    close = StoreClient.close

    async def interrupted(self: StoreClient) -> None:
        if not giving_up.is_set():
            giving_up.set()
            await asyncio.Event().wait()
        await close(self)

    monkeypatch.setattr(StoreClient, "close", interrupted)
    staying = asyncio.ensure_future(link.stay_attached())
    await store.stop(0)
    await giving_up.wait()
    staying.cancel()
    await asyncio.gather(staying, return_exceptions=True)
    await link.close()
    assert state(client) is grpc.ChannelConnectivity.SHUTDOWN
