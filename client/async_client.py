"""The SDK for asyncio: AsyncClient("host:port"). client/client.py is its mirror image for threads.

AsyncClient ── generate() ─► Completion
            ── stream()   ─► AsyncStream ─► Admitted, Delta …, Finished     left early: cancelled in the whole cluster
            ── models() · cancel() · status() · explain()
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, Unpack

import grpc
import grpc.aio

from ..protocol.channel import open_channel
from ..protocol.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from .access import Control, Metadata, checked_address, key_metadata, require_control
from .attempts import Attempts, ClosedFlag
from .client import CALL_TIMEOUT_S
from .cluster_status import ClusterStatus, Model
from .completion import Collector, Completion, Delta, Event, event_from_proto
from .explanation import Explanation
from .options import GenerateOptions, build_request, checked_timeout_s, with_options

Reply = TypeVar("Reply")


class AsyncStream(AsyncIterator[Event]):
    """The events of one request. Closing it, leaving its `async with`, dropping it, or cancelling the task that
    reads it cancels the request everywhere."""

    def __init__(self, stub: Any, request: inference_pb2.GenerateRequest, peer: str, client: ClosedFlag, metadata: Metadata = ()) -> None:
        self._stub = stub
        self._metadata = metadata
        self._client = client
        self._request = request
        self._attempts = Attempts(peer, request.timeout_s if request.HasField("timeout_s") else None)
        self._collector = Collector()
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._call = self._start()

    @property
    def request_id(self) -> str | None:
        """None before the first event."""
        return self._collector.admitted.request_id if self._collector.admitted else None

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Event:
        """Raises an error of protocol/errors.py."""
        while not self._closed:
            try:
                reply = await self._call.read()
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(self._attempts.delay_after(error, replied=self._collector.admitted is not None))
                self._call = self._start()
                continue
            if reply is grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue] - grpc's __init__ exports it
                self._closed = True
                break
            event = event_from_proto(reply)
            self._collector.add(event)
            return event
        raise StopAsyncIteration

    async def text(self) -> AsyncIterator[str]:
        """The new text only, piece by piece. For requests of one choice."""
        try:
            async for event in self:
                if isinstance(event, Delta) and event.text:
                    yield event.text
        finally:
            self.close()

    async def completion(self) -> Completion:
        """Reads to the end what has not been read. Raises ValueError for a stream that was closed early."""
        async for _ in self:
            pass
        return self._collector.completion()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # the collector may run in any thread, and after the loop's end
        if hasattr(self, "_call") and not self._closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)

    def _start(self) -> Any:
        self._client.require_open()
        remaining_s = self._attempts.remaining_s
        if remaining_s is not None:
            self._request.timeout_s = remaining_s
        return self._stub.Generate(self._request, timeout=self._attempts.call_timeout_s, metadata=self._metadata)


class OwnLoop:
    """The event loop that an AsyncClient was made in."""

    def __init__(self, address: str) -> None:
        """Raises RuntimeError where none is running."""
        self._address = address
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError("no event loop is running; make an AsyncClient in a coroutine, or use Client") from None

    def require(self) -> None:
        """Raises RuntimeError in another loop."""
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                f"this AsyncClient of {self._address} belongs to another event loop; make one in each loop, and close it there"
            )


class AsyncClient:
    """Belongs to the event loop that is running when it is made; in another one, and once closed, every call raises RuntimeError.

    Connects on first use. Raises ConfigError for what is no address.

    Args:
        address: "host:port" of the proxy's gRPC face.
        api_key: where the cluster has keys.
        authority: PEM of who signed the front's certificate, where it has TLS; b"": one that this machine trusts. None: it has none.
        control: for status() and explain(), which are for operators.
    """

    def __init__(self, address: str, *, api_key: str = "", authority: bytes | None = None, control: Control | None = None) -> None:
        self.address = checked_address(address)
        self._loop = OwnLoop(address)
        self._metadata = key_metadata(api_key)
        self._control = control
        self._closed = ClosedFlag(address)
        self._channel = open_channel(address, authority=authority)
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._control_channel = None if control is None else open_channel(control.address, control.credentials)

    @with_options
    async def generate(self, **options: Unpack[GenerateOptions]) -> Completion:
        """Raises an error of protocol/errors.py: InvalidRequest, Overloaded, DeadlineExceeded, Unavailable …"""
        async with self.stream(**options) as stream:
            return await stream.completion()

    @with_options
    def stream(self, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Raises InvalidRequest at once for a wrong option; anything else comes while it is read."""
        self._loop.require()
        return AsyncStream(self._inference, build_request(options), self.address, self._closed, self._metadata)

    async def models(self, *, timeout_s: float = CALL_TIMEOUT_S) -> list[Model]:
        reply: inference_pb2.ModelsReply = await self._unary(self._inference.Models, inference_pb2.ModelsRequest(), timeout_s)
        return [Model.from_proto(model) for model in reply.models]

    async def cancel(self, request_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Whether there was such a request under way."""
        reply: inference_pb2.CancelReply = await self._unary(
            self._inference.Cancel, inference_pb2.CancelRequest(request_id=request_id), timeout_s
        )
        return reply.found

    async def status(self, *, timeout_s: float = CALL_TIMEOUT_S) -> ClusterStatus:
        """Raises ConfigError where the client was made without control."""
        return ClusterStatus.from_proto(await self._ask("Status", control_pb2.StatusRequest(), timeout_s))

    async def explain(self, request_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> list[Explanation]:
        """Why a recent request went where it went, or was refused; one for each of its choices. Raises UnknownRequest."""
        request = control_pb2.ExplainRequest(request_id=request_id)
        reply: control_pb2.ExplainReply = await self._ask("Explain", request, timeout_s)
        return [Explanation.from_proto(found) for found in reply.requests]

    async def close(self) -> None:
        self._closed.set()
        await self._channel.close()
        if self._control_channel is not None:
            await self._control_channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, method: str, request: Any, timeout_s: float) -> Any:
        """At the proxy's control."""
        self._closed.require_open()
        control = require_control(self._control)
        stub = control_pb2_grpc.ControlStub(self._control_channel)
        return await self._call(getattr(stub, method), request, timeout_s, control.address, ())

    async def _unary(self, method: Callable[..., Awaitable[Reply]], request: Any, timeout_s: float) -> Reply:
        return await self._call(method, request, timeout_s, self.address, self._metadata)

    async def _call(self, method: Callable[..., Awaitable[Reply]], request: Any, timeout_s: float, peer: str, metadata: Metadata) -> Reply:
        self._loop.require()
        attempts = Attempts(peer, checked_timeout_s(timeout_s))
        while True:
            self._closed.require_open()
            try:
                return await method(request, timeout=attempts.call_timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(attempts.delay_after(error, replied=False))
