"""protocol/tls.py and what channel.py makes of it: members talk to members of one authority, and to nobody else."""

from __future__ import annotations

import dataclasses
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
from halfmoon.protocol.front_tls import FrontCertificate
from halfmoon.protocol.tls import FRONT, MEMBER, Tls, read_pem

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of two authorities."""
    ours, others = tmp_path_factory.mktemp("ours") / "certs", tmp_path_factory.mktemp("others") / "certs"
    init(ours, ["cluster.example"], 1)
    init(others, [], 1)
    return ours, others


async def echo(request: bytes, context: Any) -> bytes:
    return request


@pytest.fixture
async def served(folders: tuple[Path, Path]) -> AsyncIterator[str]:
    server, port = create_server("127.0.0.1", 0, credentials=Credentials(TOKEN, Tls.of_members(folders[0])))
    handlers = {"Say": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def status_of(channel: grpc.aio.Channel) -> str:
    async with channel:
        try:
            assert await channel.unary_unary("/test.Echo/Say")(b"x", timeout=60) == b"x"
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


async def test_a_member_needs_a_certificate_of_the_authority_and_the_token(folders: tuple[Path, Path], served: str) -> None:
    ours, others = map(Tls.of_members, folders)
    assert await status_of(open_channel(served, Credentials(TOKEN, ours))) == "OK"
    assert await status_of(open_channel(served, Credentials("x" * 40, ours))) == "UNAUTHENTICATED"
    stolen = dataclasses.replace(others, authority=ours.authority)  # it trusts ours, and shows its own
    for wrong in (Credentials(TOKEN), Credentials(TOKEN, others), Credentials(TOKEN, stolen)):
        assert await status_of(open_channel(served, wrong)) == "UNAVAILABLE"
    assert await status_of(open_channel(served, authority=ours.authority)) == "UNAVAILABLE", "without a certificate of its own"


async def test_a_member_tells_its_token_to_no_server_of_another_authority(folders: tuple[Path, Path], served: str) -> None:
    others = Tls.of_members(folders[1])
    trusting = dataclasses.replace(Tls.of_members(folders[0]), authority=others.authority)
    assert await status_of(open_channel(served, Credentials(TOKEN, trusting))) == "UNAVAILABLE"


async def test_new_certificates_of_one_authority_get_on_with_old_ones(folders: tuple[Path, Path], served: str) -> None:
    before = Tls.of_members(folders[0])
    rotate(folders[0], [], 1)
    after = Tls.of_members(folders[0])
    assert after.authority == before.authority and after.certificate != before.certificate and after.key != before.key
    for tls in (before, after):
        assert await status_of(open_channel(served, Credentials(TOKEN, tls))) == "OK"


async def test_the_clients_port_shows_the_front_s_certificate_and_asks_for_none(folders: tuple[Path, Path]) -> None:
    ours = folders[0]
    certificate = FrontCertificate(ours / f"{FRONT}.pem", ours / f"{FRONT}.key")
    server, port = create_server("127.0.0.1", 0, certificate=certificate)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Echo", {"Say": grpc.unary_unary_rpc_method_handler(echo)}),)
    )
    await server.start()
    address = f"127.0.0.1:{port}"
    authorities = [read_pem(folder / "authority.pem") for folder in folders]
    assert [await status_of(open_channel(address, authority=one)) for one in authorities] == ["OK", "UNAVAILABLE"]
    assert await status_of(open_channel(address)) == await status_of(open_channel(address, authority=b"")) == "UNAVAILABLE"
    await server.stop(None)


def test_a_key_is_shown_by_nothing_and_a_folder_without_certificates_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    key = read_pem(folders[0] / f"{MEMBER}.key")
    shown = repr(Credentials(TOKEN, Tls.of_members(folders[0])))
    assert repr(key)[2:-1] not in shown and "PRIVATE" not in shown
    with pytest.raises(ConfigError, match="halfmoon certs init"):
        Tls.of_members(tmp_path)
    (tmp_path / "authority.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"authority\.pem is no PEM file"):
        Tls.of_members(tmp_path)
