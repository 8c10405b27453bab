"""A small schema, real stores over loopback, clients of every transport, and KV that can be told apart."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pytest

from halfmoon.kvstore.block_rows import BlockRows
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.connection import Connection
from halfmoon.kvstore.reader import BlockReader
from halfmoon.kvstore.server import StoreServer
from halfmoon.kvstore.transport import Piece, TransportName
from halfmoon.kvstore.writer import BlockWriter
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, kvstore_pb2

NODE = "node-a"
SCHEMA = KVSchema(model_fingerprint="f" * 16, dtype="float32", num_layers=3, num_kv_heads=2, head_dim=4, block_size=4)


class MemoryTransport:
    """The bytes in a dict that both sides hold; the store sees notes only."""

    name: TransportName = "shm"
    threads: Executor | None = None

    memory: np.ndarray | None = np.zeros(0, np.uint8)  # rows() may be called

    def __init__(self, slots: dict[int, np.ndarray]) -> None:
        """slots: uint8 [num_layers * layer_bytes] by number."""
        self._slots = slots

    def push(self, lease_id: str, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[Piece]:
        for row, block in zip(self.rows(slots, layer), blocks, strict=True):
            row[:] = block
        yield Piece(0, len(slots), kvstore_pb2.PushRequest(layer=layer, first_block=first_block, num_blocks=len(slots)))

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        width = SCHEMA.layer_bytes
        whole = [self._slots.setdefault(slot, np.zeros(SCHEMA.num_layers * width, np.uint8)) for slot in slots]
        return BlockRows([slot[layer * width : (layer + num_layers) * width][None] for slot in whole])

    def fetch(self, lease_id: str, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        return self.rows(slots, part.layer, max(part.num_layers, 1))

    def close(self) -> None:
        pass


class KV:
    """Block keys and bytes made from names: kv.keys("a", 3), kv.blocks("a", 3) [n, num_layers, layer_bytes]."""

    schema = SCHEMA
    node = NODE
    state = common_pb2.HandoffState(num_tokens=11, first_token=common_pb2.TokenOutput(token_id=42))

    def keys(self, name: str, num_blocks: int) -> list[bytes]:
        return [hashlib.blake2b(f"{name}/{index}".encode(), digest_size=16).digest() for index in range(num_blocks)]

    def blocks(self, name: str, num_blocks: int, schema: KVSchema = SCHEMA) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        shape = (num_blocks, schema.num_layers, schema.layer_bytes)
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    async def push(self, writer: BlockWriter, blocks: np.ndarray) -> None:
        """Every layer of all blocks, from a thread as an engine does."""

        def run() -> None:
            for layer in range(blocks.shape[1]):
                writer.push(layer, 0, np.ascontiguousarray(blocks[:, layer]))

        await asyncio.to_thread(run)

    async def read(self, reader: BlockReader, schema: KVSchema = SCHEMA) -> np.ndarray:
        found = np.zeros((reader.num_blocks, schema.num_layers, schema.layer_bytes), dtype=np.uint8)
        async for part in reader.slices():
            for index, block in enumerate(part.blocks):
                found[part.first_block + index, part.layer : part.layer + part.num_layers] = block.reshape(part.num_layers, -1)
        return found

    async def hand_off(self, client: StoreClient, name: str, num_blocks: int = 2, epoch: int = 1, deadline_s: float = 10) -> np.ndarray:
        """Reserves, pushes and seals hand-off `name`, all blocks but the last with keys."""
        blocks = self.blocks(name, num_blocks)
        writer = await client.reserve(name, epoch, self.keys(name, num_blocks - 1), num_blocks, deadline_s)
        await self.push(writer, blocks)
        await writer.seal(self.state)
        return blocks

    async def cache(self, client: StoreClient, name: str, num_blocks: int, deadline_s: float = 0) -> np.ndarray:
        blocks = self.blocks(name, num_blocks)
        writer = await client.cache(self.keys(name, num_blocks), deadline_s)
        await self.push(writer, blocks)
        await writer.seal(common_pb2.HandoffState())
        return blocks


@pytest.fixture
def kv() -> KV:
    return KV()


StartStore = Callable[..., Awaitable[StoreServer]]


@pytest.fixture
def credentials() -> Credentials | None:
    """Of the stores and their clients."""
    return None


@pytest.fixture
async def start_store(credentials: Credentials | None) -> AsyncIterator[StartStore]:
    """start_store(num_slots=8, lease_ttl_s=5.0, schema=None, port=0) -> a running store."""
    started: list[StoreServer] = []

    async def start(num_slots: int = 8, lease_ttl_s: float = 5.0, schema: KVSchema | None = None, port: int = 0) -> StoreServer:
        config = StoreConfig(arena_bytes=num_slots * SCHEMA.block_bytes, lease_ttl_s=lease_ttl_s)
        server = StoreServer(config, node_id=NODE, schema=schema, credentials=credentials)
        started.append(server)
        await server.start("127.0.0.1", port)
        return server

    yield start
    for server in started:
        await server.stop(0)


@pytest.fixture
async def store(start_store: StartStore) -> StoreServer:
    return await start_store()


Attach = Callable[..., Awaitable[StoreClient]]


@pytest.fixture(params=["shm", "tcp", "grpc", "memory"])
async def attach(request: pytest.FixtureRequest, store: StoreServer) -> AsyncIterator[Attach]:
    """attach("prefill-0") -> a client of the store, over each transport in turn."""
    clients: list[Any] = []
    slots: dict[int, np.ndarray] = {}

    async def attach_client(client_id: str, server: StoreServer = store) -> StoreClient:
        if request.param == "memory":
            connection = Connection(server.address, client_id)
            await connection.open(NODE, SCHEMA, 5.0)
            client = StoreClient(connection, SCHEMA, MemoryTransport(slots))
        else:
            transport = "auto" if request.param == "shm" else request.param
            client = await StoreClient.attach(server.address, client_id=client_id, node_id=NODE, schema=SCHEMA, transport=transport)
            assert client.transport == request.param
        clients.append(client)
        return client

    yield attach_client
    for client in clients:
        await client.close()


@pytest.fixture
async def attach_to(credentials: Credentials | None) -> AsyncIterator[Attach]:
    """attach_to(address, client_id, **options) -> a client of any store."""
    clients: list[StoreClient] = []

    async def attach_client(address: str, client_id: str, **options: Any) -> StoreClient:
        options = {"node_id": NODE, "schema": SCHEMA, "credentials": credentials, **options}
        clients.append(await StoreClient.attach(address, client_id=client_id, **options))
        return clients[-1]

    yield attach_client
    for client in clients:
        await client.close()
