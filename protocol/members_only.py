"""Both ends of the cluster's token: a channel that sends it with each call, a server that serves nobody without it."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from .credentials import Credentials
from .errors import Unauthenticated
from .grpc_errors import abort

REFUSAL = (
    "this port serves processes of its cluster, and the call brought no token of it; "
    "`halfmoon status` and its like find the token where `halfmoon serve` was started, or in HALFMOON_CLUSTER_TOKEN"
)


class MembersOnly(grpc.aio.ServerInterceptor):
    """Before any other interceptor: a stranger learns not even which methods there are, and none of its bytes is parsed."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        if self._credentials.admit(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)
        return _REFUSED


async def _refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
    await abort(context, Unauthenticated(REFUSAL))


_REFUSED: Any = grpc.stream_stream_rpc_method_handler(_refuse)  # for calls of every kind: it reads nothing and sends nothing


class _Method:
    """A method of a channel, to be called: in the channel of now, with the token.

    Args:
        now: opens the channel anew where that is due, and has forget() called.
    """

    def __init__(
        self, now: Callable[[], grpc.aio.Channel], make: Callable[[grpc.aio.Channel], Any], token: tuple[tuple[str, str], ...]
    ) -> None:
        self._now = now
        self._make = make
        self._token = token
        self._made: Any = None  # it holds its channel open

    def __call__(self, *args: Any, metadata: Any = (), **options: Any) -> Any:
        channel = self._now()
        if self._made is None:
            self._made = self._make(channel)
        return self._made(*args, metadata=(*metadata, *self._token) if metadata else self._token, **options)

    def forget(self) -> None:
        self._made = None


class MemberChannel(grpc.aio.Channel):
    """A channel whose calls carry the token. It is no client interceptor: those wrap each call in a task and queues of their own.

    gRPC gives a channel its certificates once. Calls that begin after they were renewed go through a channel that is opened anew. Those
    under way go on in the one before, which is kept until the next time.

    Args:
        open_anew: a channel with the certificates that count now.
    """

    def __init__(self, open_anew: Callable[[], grpc.aio.Channel], credentials: Credentials) -> None:
        self._open_anew = open_anew
        self._credentials = credentials
        self._metadata = credentials.metadata
        self._tls = credentials.tls
        self._channel = open_anew()
        self._before: grpc.aio.Channel | None = None
        self._methods: weakref.WeakSet[_Method] = weakref.WeakSet()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._with_token(lambda channel: channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._with_token(lambda channel: channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._with_token(lambda channel: channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._with_token(lambda channel: channel.stream_stream(*args, **options))

    def _with_token(self, make: Callable[[grpc.aio.Channel], Any]) -> Any:
        method = _Method(self._now, make, self._metadata)
        self._methods.add(method)
        return method

    def _now(self) -> grpc.aio.Channel:
        if self._tls is not self._credentials.tls:
            self._tls = self._credentials.tls
            # the one before that is let go: gRPC closes it behind the last of its calls, if no method holds it
            self._before, self._channel = self._channel, self._open_anew()
            for method in self._methods:
                method.forget()
        return self._channel

    async def __aenter__(self) -> MemberChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        if self._before is None:
            await self._channel.close(grace)
        else:
            await asyncio.gather(self._before.close(grace), self._channel.close(grace))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._now().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._now().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._now().channel_ready()
