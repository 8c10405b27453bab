"""Stores: a session at another node's store is closed once, whatever interrupts its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from halfmoon.engine.stores import Stores
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.schema import KVSchema

SCHEMA = KVSchema(model_fingerprint="tiny", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)


async def nothing(client: StoreClient) -> None: ...


@pytest.fixture
async def other() -> AsyncIterator[StoreServer]:
    store = StoreServer(StoreConfig(arena_bytes=2**20), node_id="node-u")
    await store.start("127.0.0.1")
    yield store
    await store.stop(0.0)


@pytest.fixture
def stores() -> Stores:
    return Stores(
        "127.0.0.1:9", client_id="prefill-0", node_id="node-t", schema=SCHEMA, transport="auto",
        on_lost=lambda client: None, on_attached=nothing,
    )  # fmt: skip


def is_closed(client: StoreClient) -> bool:
    threads = client._transport.threads
    assert threads is not None
    return vars(threads)["_shutdown"]


async def test_a_lost_session_whose_end_is_interrupted_by_close_is_closed(
    stores: Stores, other: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, closing = await stores.client(other.address), asyncio.Event()
    close = StoreClient.close

    async def interrupted(self: StoreClient) -> None:
        if not closing.is_set():
            closing.set()
            await asyncio.Event().wait()
        await close(self)

    monkeypatch.setattr(StoreClient, "close", interrupted)
    await other.stop(0.0)
    await closing.wait()
    await stores.close()
    assert is_closed(client)


async def test_a_cancelled_close_of_a_client_ends_its_threads_too(stores: Stores, other: StoreServer) -> None:
    client, waiting = await stores.client(other.address), asyncio.Event()

    async def refuse_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            waiting.set()
            await asyncio.Event().wait()

    client._connection.spawn(refuse_to_end(), "refusing to end")
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(client.close())
    await waiting.wait()
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert is_closed(client)
    await stores.close()
