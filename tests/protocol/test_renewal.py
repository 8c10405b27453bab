"""Certificates that change under calls: new connections have the new ones, nothing that is under way notices."""

from __future__ import annotations

import asyncio
import socket
import ssl
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from halfmoon.deploy.certificates import init, rotate
from halfmoon.protocol.channel import create_server, open_channel
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.errors import ConfigError
from halfmoon.protocol.tls import AUTHORITY, MEMBER, Tls
from halfmoon.tests.waiting import until

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init(tmp_path / "certs", [], 1)
    return tmp_path / "certs"


def rotated(folder: Path, days: int = 1) -> Tls:
    rotate(folder, [], days)
    return Tls.of_members(folder)


class Peer:
    """A server that counts whose certificates were shown, with credentials of its own as a process has."""

    def __init__(self, tls: Tls) -> None:
        self.credentials = Credentials(TOKEN, tls)
        self.shown: set[bytes] = set()
        self.go_on = asyncio.Event()

    async def start(self) -> None:
        self.server, port = create_server("127.0.0.1", 0, credentials=self.credentials)
        handlers = {"Say": grpc.unary_unary_rpc_method_handler(self._say), "Count": grpc.unary_stream_rpc_method_handler(self._count)}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Peer", handlers),))
        await self.server.start()
        self.address = f"127.0.0.1:{port}"

    async def _say(self, request: bytes, context: Any) -> bytes:
        self.shown.add(context.auth_context()["x509_pem_cert"][0])
        return request

    async def _count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"1"
        await self.go_on.wait()
        yield b"2"

    def certificate(self, tls: Tls) -> str:
        """That it shows to a new connection."""
        host, port = self.address.split(":")
        context = tls.context(server_side=False)
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(socket.create_connection((host, int(port)), 60)) as connection:
            return ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")


@pytest.fixture
async def peer(folder: Path) -> AsyncIterator[Peer]:
    found = Peer(Tls.of_members(folder))
    await found.start()
    yield found
    await found.server.stop(None)


async def status_of(peer: Peer, tls: Tls) -> str:
    async with open_channel(peer.address, Credentials(TOKEN, tls)) as channel:
        try:
            await channel.unary_unary("/test.Peer/Say")(b"x", timeout=60)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.parametrize("first", ["server", "client"])
async def test_calls_go_on_while_both_sides_change_over(first: str, folder: Path, peer: Peer) -> None:
    client = Credentials(TOKEN, Tls.of_members(folder))
    before, num_said, said = Tls.of_members(folder), 0, asyncio.Event()
    async with open_channel(peer.address, client) as channel, asyncio.timeout(60):
        say, count = channel.unary_unary("/test.Peer/Say"), channel.unary_stream("/test.Peer/Count")
        counting: Any = count(b"")
        assert await counting.read() == b"1"

        async def talk() -> None:
            nonlocal num_said
            while True:
                assert await say(b"%d" % num_said) == b"%d" % num_said
                num_said += 1
                said.set()

        talking = asyncio.create_task(talk())
        await said.wait()
        tls = rotated(folder)
        sides = [peer.credentials, client] if first == "server" else [client, peer.credentials]
        for side in sides:
            await asyncio.to_thread(side.renew, tls)
            for _ in range(3):
                assert await say(b"x") == b"x"
        assert peer.shown == {before.certificate, tls.certificate}, "the client's new one is shown by calls that begin after the change"
        assert (await asyncio.to_thread(peer.certificate, before)).encode() == tls.certificate
        peer.go_on.set()
        assert await counting.read() == b"2", "a call that was under way"
        said.clear()
        await said.wait()
        assert not talking.done()
        talking.cancel()


async def test_a_close_ends_calls_from_before_a_change_too(folder: Path, peer: Peer) -> None:
    client = Credentials(TOKEN, Tls.of_members(folder))
    channel = open_channel(peer.address, client)
    counting: Any = channel.unary_stream("/test.Peer/Count")(b"")
    assert await counting.read() == b"1"
    client.renew(rotated(folder))
    assert await channel.unary_unary("/test.Peer/Say")(b"x") == b"x"
    await channel.close()
    assert await counting.code() is grpc.StatusCode.CANCELLED


async def test_a_channel_from_before_is_let_go_though_there_are_methods_that_nobody_calls(folder: Path, peer: Peer) -> None:
    client = Credentials(TOKEN, Tls.of_members(folder))
    async with open_channel(peer.address, client) as channel:
        say, never_called = channel.unary_unary("/test.Peer/Say"), channel.unary_stream("/test.Peer/Count")
        assert await say(b"x") == b"x"
        first = weakref.ref(channel._channel)  # type: ignore[attr-defined]
        for _ in range(2):  # the channel before is kept for the calls that are under way in it
            client.renew(rotated(folder))
            assert await say(b"x") == b"x"
        await until(lambda: first() is None)
        peer.go_on.set()
        assert await never_called(b"").read() == b"1"


async def test_an_expired_certificate_is_neither_admitted_nor_taken(folder: Path, peer: Peer) -> None:
    good = Tls.of_members(folder)
    expired = rotated(folder, days=0)
    assert await status_of(peer, expired) == "UNAVAILABLE"
    with pytest.raises(ConfigError, match="expired"):
        peer.credentials.renew(expired)
    assert peer.credentials.tls == good and await status_of(peer, good) == "OK"
    late = Credentials(TOKEN, expired)
    late.renew(good)  # who comes late has nothing to lose
    assert await status_of(peer, late.tls or expired) == "OK"


async def test_another_authority_comes_in_three_steps_and_not_in_one(folder: Path, peer: Peer, tmp_path: Path) -> None:
    init(tmp_path / "others", [], 1)
    ours, others = Tls.of_members(folder), Tls.of_members(tmp_path / "others")
    both = ours.authority + others.authority
    with pytest.raises(ConfigError, match=r"let authority\.pem hold both"):
        peer.credentials.renew(others)
    with pytest.raises(ConfigError, match=r"let authority\.pem hold both"):
        peer.credentials.renew(Tls(both, others.certificate, others.key))
    client = Credentials(TOKEN, ours)
    async with open_channel(peer.address, client) as channel:
        say = channel.unary_unary("/test.Peer/Say")
        for step in (Tls(both, ours.certificate, ours.key), Tls(both, others.certificate, others.key), others):
            for side in (client, peer.credentials):
                side.renew(step)
                assert await say(b"x", timeout=60) == b"x"
    assert [await status_of(peer, tls) for tls in (ours, others)] == ["UNAVAILABLE", "OK"]


def test_a_key_of_another_certificate_is_refused_and_all_stays_as_it_was(folder: Path) -> None:
    before = Tls.of_members(folder)
    credentials = Credentials(TOKEN, before)
    after = rotated(folder)
    with pytest.raises(ConfigError, match="can't be used"):
        credentials.renew(Tls(after.authority, after.certificate, before.key))
    with pytest.raises(ConfigError, match="can't be used"):
        credentials.renew(Tls(after.authority, after.certificate[: len(after.certificate) // 2], after.key))
    assert credentials.tls == before
    with pytest.raises(ConfigError, match="without certificates"):
        Credentials(TOKEN).renew(after)
    assert {AUTHORITY, MEMBER} <= {path.stem for path in folder.iterdir()}
