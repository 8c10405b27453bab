"""What a client says of an address that leads nowhere, and of an event loop that is not its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from halfmoon.client import AsyncClient, Client, Unavailable
from halfmoon.protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:8000", "is a URL; a client speaks gRPC"),
        ("grpc://somewhere:1", "is a URL"),
        ("127.0.0.1", "it must be host:port"),
        ("127.0.0.1:", "it must be host:port"),
        (":50051", "it must be host:port"),
        ("somewhere:http", "it must be host:port"),
        ("somewhere:65536", "it must be host:port"),
        ("", "it must be host:port"),
    ],
)
def test_what_is_no_address_is_refused_where_the_client_is_made(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Client(address)

    async def make() -> AsyncClient:
        return AsyncClient(address)

    with pytest.raises(ConfigError, match=says):
        asyncio.run(make())


@pytest.mark.parametrize("address", ["localhost:50051", "[::1]:50051", "unix:/tmp/x", "dns:///somewhere:50051", "a.b-c:1"])
def test_what_is_an_address_is_taken(address: str) -> None:
    Client(address).close()


def test_the_port_of_an_http_server_is_told_from_a_dead_one(face: Any) -> None:
    address = face.http.removeprefix("http://")
    with Client(address) as client, pytest.raises(Unavailable, match="speaks no gRPC, or only by TLS") as found:
        client.generate(prompt="x", timeout_s=60)
    assert address in found.value.message

    async def ask() -> Any:
        async with AsyncClient(address) as client:
            return await client.models()

    with pytest.raises(Unavailable, match="speaks no gRPC"):
        asyncio.run(ask())


async def _made(address: str) -> AsyncClient:
    return AsyncClient(address)


def test_an_async_client_says_that_it_belongs_to_another_loop(face: Any) -> None:
    client = asyncio.run(_made(face.grpc))

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            await client.generate(prompt="x")
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            await client.models()

    asyncio.run(elsewhere())


def test_an_async_client_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="make an AsyncClient in a coroutine"):
        AsyncClient("127.0.0.1:1")
