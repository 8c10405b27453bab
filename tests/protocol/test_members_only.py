"""protocol/credentials.py and members_only.py: nobody is served without the cluster's token, whatever kind of call it is."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from halfmoon.protocol.channel import create_server, open_channel
from halfmoon.protocol.credentials import KEY, VARIABLE, Credentials
from halfmoon.protocol.errors import ConfigError, Unauthenticated, Unavailable
from halfmoon.protocol.grpc_errors import from_rpc_error

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
OURS = Credentials(TOKEN)
KINDS = {"unary_unary": False, "unary_stream": False, "stream_unary": True, "stream_stream": True}


class Echo:
    """A method of each kind that gives back the last message."""

    def __init__(self) -> None:
        self.served: list[str] = []

    def handlers(self) -> Any:
        found = {
            kind: getattr(grpc, f"{kind}_rpc_method_handler")(getattr(self, "many" if kind.endswith("stream") else "one")) for kind in KINDS
        }
        return grpc.method_handlers_generic_handler("test.Echo", found)

    async def _last(self, request: Any) -> bytes:
        if isinstance(request, bytes):
            return request
        found = b""
        async for message in request:
            found = message
        return found

    async def one(self, request: Any, context: Any) -> bytes:
        self.served.append("one")
        return await self._last(request)

    async def many(self, request: Any, context: Any) -> None:
        self.served.append("many")
        await context.write(await self._last(request))


async def ask(channel: grpc.aio.Channel, kind: str, **options: Any) -> bytes:
    method = getattr(channel, kind)(f"/test.Echo/{kind}")
    call = method(iter([b"a", b"b"]) if KINDS[kind] else b"b", timeout=60, **options)
    if kind.endswith("stream"):
        return b"".join([reply async for reply in call])
    return await call


async def test_every_kind_of_call_needs_the_token_and_is_served_with_it() -> None:
    echo = Echo()
    server, port = create_server("127.0.0.1", 0, credentials=OURS)
    server.add_generic_rpc_handlers((echo.handlers(),))
    await server.start()
    address = f"127.0.0.1:{port}"
    for kind in KINDS:
        async with open_channel(address, OURS) as member:
            assert await ask(member, kind) == b"b"
            assert await ask(member, kind, metadata=(("traceparent", "x"),)) == b"b", "beside other metadata"
    echo.served.clear()
    for wrong in (None, Credentials(TOKEN[:-1] + "0"), Credentials(TOKEN * 2)):
        async with open_channel(address, wrong) as stranger:
            for kind in KINDS:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(stranger, kind)
                error = from_rpc_error(caught.value, "it")
                # grpc.aio may lose the status of a call that ends while it sends
                assert isinstance(error, (Unauthenticated, Unavailable) if KINDS[kind] else Unauthenticated)
                assert TOKEN not in str(error)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stranger.unary_unary("/test.Echo/none")(b"")
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, "a stranger does not learn which methods there are"
    assert echo.served == []
    await server.stop(None)


def test_a_token_is_shown_by_nothing_and_two_are_never_the_same() -> None:
    made = Credentials.make()
    assert made.token not in repr(made) and len(made.token) >= 43 and made != Credentials.make()
    assert made.admit(((KEY, made.token),)) and made.admit(((KEY, made.token.encode()),))
    assert not made.admit(()) and not made.admit(((KEY, ""),)) and not made.admit((("other", made.token),))
    assert not made.admit(((KEY, "ü" * 43),)), "and no error"


def test_the_environment_s_token_is_taken_and_a_guessable_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Credentials.from_environment() is None
    monkeypatch.setenv(VARIABLE, TOKEN)
    assert Credentials.from_environment() == OURS
    for short in ("secret", "x" * 31, "x" * 40 + " ", "x" * 40 + "\n"):
        with pytest.raises(ConfigError, match="32 characters or more") as caught:
            Credentials(short)
        assert short not in str(caught.value)


OPENERS = {"create_server", "open_channel", "stay_joined", "attach", "StoreAccess", "Connection"}
OPEN_TO_USERS = {"client/async_client.py:open_channel"}


def test_every_channel_and_every_server_of_the_cluster_is_given_its_credentials() -> None:
    """The SDK's channel to the clients' port is the one without; the proxy's own server there is given None in so many words."""
    found: dict[str, list[bool]] = {}
    for path in ROOT.rglob("*.py"):
        where = path.relative_to(ROOT).as_posix()
        if where.startswith(("tests/", "build/", "protocol/channel.py", ".")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            is_opener = name in OPENERS and owner != "socket" and (name != "attach" or owner in ("StoreClient", "cls"))
            if is_opener:
                names = {keyword.arg for keyword in node.keywords} | {ast.unparse(argument).rpartition(".")[2] for argument in node.args}
                given = any(str(name).lstrip("_") == "credentials" for name in names)
                found.setdefault(f"{where}:{name}", []).append(given)
            assert name not in ("insecure_channel", "add_insecure_port") or where in ("client/client.py",), (
                f"{where} opens a port of its own"
            )
    assert {name for name, given in found.items() if not all(given)} == OPEN_TO_USERS, found
    assert len(found) >= 15, "this test looks at something"
