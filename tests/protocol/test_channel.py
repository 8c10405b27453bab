"""Channels to peers that are stopped: their connection stands, their kernel still acknowledges."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest

from halfmoon.protocol.channel import OPTIONS, create_server, open_channel

PEER = """
import asyncio
import grpc
from halfmoon.protocol.channel import create_server

async def hang(request, context):
    await asyncio.Event().wait()

async def main():
    server, port = create_server("127.0.0.1", 0)
    handlers = {"Hang": grpc.unary_unary_rpc_method_handler(hang)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Peer", handlers),))
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()

asyncio.run(main())
"""


@pytest.fixture
def peer() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    process = subprocess.Popen([sys.executable, "-c", PEER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield process, f"127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()


def test_a_ping_waits_no_longer_for_its_answer_than_keepalive_says() -> None:
    options = dict(OPTIONS)
    assert options["grpc.http2.ping_timeout_ms"] == options["grpc.keepalive_timeout_ms"] <= 3_000


@pytest.mark.slow
async def test_a_call_to_a_stopped_process_fails_by_keepalive_and_not_after_a_minute(peer: tuple[subprocess.Popen[bytes], str]) -> None:
    process, address = peer
    async with open_channel(address) as channel, asyncio.timeout(45):  # 64 s by gRPC's own defaults
        call = channel.unary_unary("/test.Peer/Hang")(b"")
        await channel.channel_ready()
        await asyncio.sleep(0)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_connection_that_does_not_speak_http2_is_closed_in_time() -> None:
    """The keepalive would close both, after 8 s."""
    async with contextlib.AsyncExitStack() as exits:
        ends: dict[float, asyncio.Task[bytes]] = {}
        for limit_s in (60.0, 0.2):
            server, port = create_server("127.0.0.1", 0, handshake_timeout_s=limit_s)
            await server.start()
            exits.push_async_callback(server.stop, None)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            exits.callback(writer.close)
            ends[limit_s] = asyncio.create_task(reader.read(-1))
        await asyncio.wait(ends.values(), timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert ends[0.2].done() and not ends[60.0].done()
        ends[60.0].cancel()
