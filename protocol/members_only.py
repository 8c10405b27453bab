"""Both ends of the cluster's token: a channel that sends it with each call, a server that serves nobody without it."""

from __future__ import annotations

import asyncio
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

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._with_token(lambda channel: channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._with_token(lambda channel: channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._with_token(lambda channel: channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._with_token(lambda channel: channel.stream_stream(*args, **options))

    def _with_token(self, make: Callable[[grpc.aio.Channel], Any]) -> Any:
        ours = self._metadata
        method, made_with = make(self._now()), self._tls

        def call(*args: Any, metadata: Any = (), **options: Any) -> Any:
            nonlocal method, made_with
            channel = self._now()
            if made_with is not self._tls:
                method, made_with = make(channel), self._tls
            return method(*args, metadata=(*metadata, *ours) if metadata else ours, **options)

        return call

    def _now(self) -> grpc.aio.Channel:
        if self._tls is not self._credentials.tls:
            self._tls = self._credentials.tls
            # the one before that is let go: gRPC closes it behind the last of its calls
            self._before, self._channel = self._channel, self._open_anew()
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
