"""Anything at a store: a typed answer, an empty log, books that add up, and a store that serves."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.v1 import kvstore_pb2


async def test_anything_at_a_store_gets_a_typed_answer(store: StoreServer, kv: Any, fuzz: Any, caplog: pytest.LogCaptureFixture) -> None:
    services = kvstore_pb2.DESCRIPTOR.services_by_name.values()
    statuses = await asyncio.to_thread(fuzz, store.address, services)
    print(statuses)
    assert statuses["INVALID_ARGUMENT"] > 20
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    client = await StoreClient.attach(store.address, client_id="decode-0", node_id=kv.node, schema=kv.schema)
    try:
        blocks = await kv.hand_off(client, "a")
        reader = await client.fetch("a", 1, 60.0)
        assert np.array_equal(await kv.read(reader), blocks)
        await reader.release()
    finally:
        await client.close()
