"""Both ends of the cluster's token: a channel that sends it with each call, a server that serves nobody without it."""

from __future__ import annotations

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
    """A channel whose calls carry the token. It is no client interceptor: those wrap each call in a task and queues of their own."""

    def __init__(self, channel: grpc.aio.Channel, credentials: Credentials) -> None:
        self._channel = channel
        self._metadata = credentials.metadata

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._with_token(self._channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._with_token(self._channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._with_token(self._channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._with_token(self._channel.stream_stream(*args, **options))

    def _with_token(self, method: Any) -> Any:
        ours = self._metadata

        def call(*args: Any, metadata: Any = (), **options: Any) -> Any:
            return method(*args, metadata=(*metadata, *ours) if metadata else ours, **options)

        return call

    async def __aenter__(self) -> MemberChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()
