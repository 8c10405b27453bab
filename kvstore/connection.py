"""A client's session with one store: channel, Attach stream, heartbeats, and what happens to calls when the store is gone.

Attach ─► Welcome ─► heartbeats … ─► stream ends, or no answer within lease_ttl_s ─► lost: pending calls raise StoreUnavailable
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio

from ..protocol.channel import open_channel
from ..protocol.credentials import Credentials, SocketTls
from ..protocol.errors import HalfmoonError, RequestCancelled, StoreUnavailable, Unavailable
from ..protocol.grpc_errors import from_rpc_error
from ..protocol.schema import KVSchema
from ..protocol.tasks import Tasks, beside
from ..protocol.v1 import kvstore_pb2, kvstore_pb2_grpc
from .streams import read_next

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Connection:
    """Belongs to the event loop that opened it."""

    def __init__(self, address: str, client_id: str, credentials: Credentials | None = None) -> None:
        self.address = address
        self.client_id = client_id
        self.lost = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.welcome = kvstore_pb2.AttachReply.Welcome()
        self._channel = open_channel(address, credentials)
        self.tls = SocketTls.of_client(credentials)
        self.stub = kvstore_pb2_grpc.KVStoreStub(self._channel)
        self.on_end: list[Callable[[], None]] = []  # called once, when the session ends from either side
        self._ended: StoreUnavailable | None = None
        self._calls: set[Any] = set()
        self._tasks = Tasks(client_id)
        self._attach: Any = None
        self._heartbeats: deque[float] = deque()  # when the unanswered ones were sent
        self._alive_until = 0.0  # the store can't have ended the session before

    @property
    def peer(self) -> str:
        return f"store {self.welcome.store_id or '?'} at {self.address}"

    @property
    def session_id(self) -> str:
        return self.welcome.session_id

    async def open(self, node_id: str, schema: KVSchema, timeout_s: float) -> None:
        """Raises SchemaMismatch, StoreUnavailable (nothing listens, or no answer within timeout_s), ConfigError."""
        hello = kvstore_pb2.AttachRequest.Hello(client_id=self.client_id, node_id=node_id, schema=schema.to_proto())
        self._attach = self.stub.Attach()
        asked = self.loop.time()
        try:
            async with asyncio.timeout(timeout_s):
                await self._attach.write(kvstore_pb2.AttachRequest(hello=hello))
                reply = await read_next(self._attach)
            if reply is None:
                raise StoreUnavailable(f"{self.peer} ended the session before it began; is it stopping?")
        except TimeoutError as error:
            await self.close()
            raise StoreUnavailable(f"{self.peer} did not answer within {timeout_s} s; is it running, and reachable from here?") from error
        except grpc.aio.AioRpcError as error:
            await self.close()
            raise self.error(error) from error
        except BaseException:
            await self.close()
            raise
        self.welcome = reply.welcome
        self._alive_until = asked + self.welcome.lease_ttl_s
        for work, what in ((self._send_heartbeats(), "sending heartbeats"), (self._watch_session(), "watching its session")):
            self._tasks.spawn(work, f"{what} at the store", self._broke)

    async def call(self, method: Any, request: Any) -> Any:
        """One unary RPC. Raises what the store raised; StoreUnavailable as soon as the store is gone."""
        self.require_open()
        call = method(request)
        self._calls.add(call)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error
        except asyncio.CancelledError:
            self.raise_if_ended()
            raise
        finally:
            self._calls.discard(call)

    def track(self, call: Any) -> Any:
        """A streaming call, cancelled when the session ends; read() then raises StoreUnavailable."""
        self.require_open()
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def spawn(self, work: Coroutine[Any, Any, Result], what: str) -> asyncio.Task[Result]:
        """Until the connection is closed. what: the work, for the log, where its exceptions are not the store's own refusals."""
        return self._tasks.spawn(work, what)

    def start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """As spawn, for work whose exceptions the caller takes from the task."""
        return self._tasks.start(work)

    def require_open(self) -> None:
        """Raises StoreUnavailable once the session has ended, from either side."""
        if self._ended is not None:
            raise StoreUnavailable(self._ended.message)

    def raise_if_ended(self) -> None:
        """On CancelledError: raises StoreUnavailable where the session's end cancelled the call, and not the caller."""
        task = asyncio.current_task()
        if self._ended is not None and (task is None or not task.cancelling()):
            raise StoreUnavailable(self._ended.message)

    async def confirm(self) -> None:
        """Raises LeaseExpired, StoreUnavailable unless the session has lived until now, so that its slots were its own.

        Costs a round trip only where heartbeats are overdue: a process that was stopped for a while finds out here.
        """
        if self.loop.time() < self._alive_until:
            return
        call = self.track(self.stub.Fetch(kvstore_pb2.FetchRequest(session_id=self.session_id, prefix=kvstore_pb2.BlockKeys())))
        try:
            await self.read(call)
        finally:
            call.cancel()

    async def read(self, call: Any) -> Any | None:
        """The next message of a tracked stream; None at its end. Raises what the store raised, StoreUnavailable where it is gone."""
        try:
            return await read_next(call)
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error
        except asyncio.CancelledError:
            self.raise_if_ended()
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise RequestCancelled("the lease was released while it was being read") from None
            raise

    def error(self, error: grpc.RpcError) -> HalfmoonError:
        status: Any = error  # grpc types RpcError without the methods that every instance has
        found = from_rpc_error(error, self.peer)
        # a status without our trailer: no store of ours answered (INTERNAL: the connection broke while the call began)
        broke = type(found) in (Unavailable, RequestCancelled) or status.code() is grpc.StatusCode.INTERNAL
        if broke and "peer" in found.fields:
            return StoreUnavailable(f"{found.message}; the store died or stopped")
        return found

    async def close(self) -> None:
        """Detaches: leases end, pending calls raise StoreUnavailable. Idempotent."""
        self._end(f"the connection to {self.peer} is closed")
        try:
            await self._tasks.close()
        finally:  # also where the caller is cancelled meanwhile
            if self._attach is not None:
                self._attach.cancel()
            await self._channel.close()

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self.welcome.heartbeat_interval_s)
            self._heartbeats.append(self.loop.time())
            try:
                await self._attach.write(kvstore_pb2.AttachRequest(heartbeat=True))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the stream has ended; _watch_session tells

    async def _watch_session(self) -> None:
        ttl_s = self.welcome.lease_ttl_s
        try:
            while True:
                reply = await self._next_answer()
                if reply is None:
                    self._lose(f"{self.peer} ended the session")
                    return
                self._alive_until = self._heartbeats.popleft() + ttl_s
        except TimeoutError:
            self._lose(f"{self.peer} did not answer heartbeats for {ttl_s} s")
        except grpc.aio.AioRpcError as error:
            self._lose(self.error(error).message)

    async def _next_answer(self) -> kvstore_pb2.AttachReply | None:
        """Raises TimeoutError where a whole time to live of heartbeats is unanswered. A process that was stopped for a while has sent
        none meanwhile, and may have answers that it has not read."""
        interval_s, ttl_s = self.welcome.heartbeat_interval_s, self.welcome.lease_ttl_s
        async with beside(read_next(self._attach)) as reading:
            await asyncio.wait({reading}, timeout=ttl_s)
            while not reading.done():
                if (len(self._heartbeats) + 1) * interval_s >= ttl_s:
                    raise TimeoutError
                await asyncio.wait({reading}, timeout=interval_s)
            return await reading

    def _broke(self, bug: Exception) -> None:
        self._lose(f"the session with {self.peer} broke: {type(bug).__name__}: {bug}")

    def _lose(self, message: str) -> None:
        logger.warning("%s lost its store: %s", self.client_id, message)
        self._end(message)
        self.lost.set()

    def _end(self, message: str) -> None:
        if self._ended is None:
            self._ended = StoreUnavailable(message)
            for callback in self.on_end:
                callback()
        for call in list(self._calls):
            call.cancel()
