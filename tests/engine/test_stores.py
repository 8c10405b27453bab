"""Stores: a session at another node's store is closed once, whatever interrupts its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from halfmoon.engine.stores import Stores
from halfmoon.kvstore.access import StoreAccess
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
    return Stores("127.0.0.1:9", StoreAccess("prefill-0", "node-t", SCHEMA), on_lost=lambda client: None, on_attached=nothing)


def is_closed(client: StoreClient) -> bool:
    threads = client._transport.threads
    assert threads is not None
    return vars(threads)["_shutdown"]


async def test_a_lost_session_whose_end_is_interrupted_by_close_is_closed(
    stores: Stores, other: StoreServer, store_closing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, closing = await stores.client(other.address), store_closing.hold_first_close(monkeypatch)
    await other.stop(0.0)
    await closing.wait()
    await stores.close()
    assert is_closed(client)


async def test_a_cancelled_close_of_a_client_ends_its_threads_too(stores: Stores, other: StoreServer, store_closing: Any) -> None:
    client = await stores.client(other.address)
    waiting = store_closing.close_slowly(client)
    await asyncio.sleep(0)  # the work has begun
    closing = asyncio.ensure_future(client.close())
    await waiting.wait()
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert is_closed(client)
    await stores.close()
