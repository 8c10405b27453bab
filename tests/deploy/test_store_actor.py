"""A store process as a member: what it holds for a proxy that is gone is freed at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import numpy as np
import pytest

from halfmoon.deploy.actors import StoreActor
from halfmoon.kvstore.client import StoreClient
from halfmoon.protocol.channel import create_server
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.errors import PermissionDenied, Unauthenticated
from halfmoon.protocol.grpc_errors import unary_boundary
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, control_pb2, control_pb2_grpc

SCHEMA = KVSchema(model_fingerprint="f" * 16, dtype="float32", num_layers=3, num_kv_heads=2, head_dim=4, block_size=4)
CREDENTIALS = Credentials.make()
STATE = common_pb2.HandoffState(num_tokens=4)


class Proxy(control_pb2_grpc.ControlServicer):
    """stores: what the store is told there are, one list after another."""

    def __init__(self) -> None:
        self.stores: asyncio.Queue[list[str]] = asyncio.Queue()

    @unary_boundary
    async def Join(self, reports: Any, context: grpc.aio.ServicerContext) -> None:
        await context.write(control_pb2.MemberOrder(accepted=True))
        while True:
            addresses = await self.stores.get()
            await context.write(control_pb2.MemberOrder(stores=control_pb2.MemberStores(addresses=addresses)))


@pytest.fixture
async def proxy(told: Proxy) -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    server, port = create_server("127.0.0.1", 0, credentials=CREDENTIALS)
    control_pb2_grpc.add_ControlServicer_to_server(told, server)
    await server.start()
    yield server, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
def told() -> Proxy:
    return Proxy()


def store_actor(store_id: str, proxy_address: str, credentials: Credentials = CREDENTIALS) -> StoreActor:
    return StoreActor(
        store_id=store_id,
        node_id="node-a",
        host="127.0.0.1",
        port=0,
        proxy_address=proxy_address,
        model_name="demo",
        config=StoreConfig(arena_bytes=16 * SCHEMA.block_bytes),
        schema=SCHEMA,
        max_model_len=64,
        credentials=credentials,
    )


async def test_blocks_are_copied_from_stores_that_the_proxy_names_and_from_nowhere_else(told: Proxy, proxy: tuple[Any, str]) -> None:
    actor, other = store_actor("store-0", proxy[1]), store_actor("store-1", proxy[1])
    address, source = await actor.start(), await other.start()
    client = await StoreClient.attach(address, client_id="proxy", node_id="", schema=SCHEMA, credentials=CREDENTIALS)
    with pytest.raises(PermissionDenied, match="no store of this cluster"):
        await client.replicate([b"k" * 16], source, 60.0)
    for _ in range(2):  # each of the two takes one
        await told.stores.put([address, source])
    async with asyncio.timeout(60):
        while actor._server._replication.sources != {address, source}:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
    assert (await client.replicate([b"k" * 16], source, 60.0)).num_blocks == 0, "it holds none of them, and was asked"
    with socket.create_server(("127.0.0.1", 0)) as outside:
        outside.setblocking(False)
        with pytest.raises(PermissionDenied):
            await client.replicate([b"k" * 16], f"127.0.0.1:{outside.getsockname()[1]}", 60.0)
        with pytest.raises(BlockingIOError):
            outside.accept()  # nobody knocked
    await client.close()
    await actor.stop(0.0)
    await other.stop(0.0)


async def test_a_store_with_another_token_is_refused_and_ends(proxy: tuple[Any, str]) -> None:
    stranger = store_actor("store-9", proxy[1], Credentials.make())
    with pytest.raises(Unauthenticated, match="brought no token of it"):
        await stranger.start()
    await stranger.stop(0.0)


async def test_hand_offs_that_a_dead_proxy_s_decode_workers_never_fetched_are_freed_long_before_their_deadline(
    proxy: tuple[grpc.aio.Server, str],
) -> None:
    server, proxy_address = proxy
    actor = store_actor("store-0", proxy_address)
    client = await StoreClient.attach(await actor.start(), client_id="prefill-0", node_id="node-a", schema=SCHEMA, credentials=CREDENTIALS)
    block = np.zeros((1, SCHEMA.layer_bytes), np.uint8)
    writers = [await client.reserve(name, 1, [], 1, 600.0) for name in ("sealed", "read", "late")]
    for writer in writers:
        for layer in range(SCHEMA.num_layers):
            writer.push(layer, 0, block)
    reader = await client.fetch("read", 1, 600.0)
    for writer in writers[:2]:
        await writer.seal(STATE)
    assert actor._server.stats().num_handoffs == 3
    await server.stop(None)  # the proxy dies

    async def left(num_handoffs: int) -> None:
        async with asyncio.timeout(60):
            while actor._server.stats().num_handoffs > num_handoffs:
                await asyncio.sleep(0.01)

    await left(2)
    assert [len(piece.blocks) async for piece in reader.slices()], "who reads already reads on"
    await reader.release()
    await left(1)
    await writers[2].seal(STATE)  # its worker had not heard yet
    await left(0)
    await client.close()
    await left(0)
    stats = actor._server.stats()
    assert (stats.num_leases, stats.num_bytes_leased) == (0, 0)
    await actor.stop(0.0)
