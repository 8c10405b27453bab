"""halfmoon.v1.KVStore over a Store. Coroutines with context.write and no generators, so that a cancel ends them at once.

A lease to read lives as long as its Fetch: the stream stays open after the seal until Release, and a Fetch that its client
cancels is a release. So nothing leaks, wherever the client stopped.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from ..protocol.durations import seconds
from ..protocol.errors import HalfmoonError, InvalidRequest, build_error
from ..protocol.grpc_errors import error_from_proto, unary_boundary
from ..protocol.tasks import beside
from ..protocol.v1 import kvstore_pb2, kvstore_pb2_grpc
from .handoff import HandoffId, Lease
from .malloc import keep_pages
from .replication import Replication
from .sessions import Session
from .store import Store
from .streams import WholeWrites, read_next
from .waiters import until_ended

Context = grpc.aio.ServicerContext


class KVStoreService(kvstore_pb2_grpc.KVStoreServicer):
    def __init__(self, store: Store, replication: Replication) -> None:
        self._store = store
        self._replication = replication

    @unary_boundary
    async def Attach(self, requests: Any, context: Context) -> None:
        first = await read_next(context)
        if first is None or first.WhichOneof("event") != "hello":
            raise InvalidRequest("the first message of Attach must be hello")
        session, welcome = self._store.attach(first.hello)
        try:
            await self._store.tiers.opened()
        except HalfmoonError:
            self._store.sessions.end(session, "was refused")
            raise
        try:
            await context.write(kvstore_pb2.AttachReply(welcome=welcome))
            writes = WholeWrites(context)
            await until_ended(self._answer_heartbeats(session, context, writes), session.ended, writes.close)
        finally:
            self._store.sessions.end(session, "went away")

    async def _answer_heartbeats(self, session: Session, context: Context, writes: WholeWrites) -> None:
        while await read_next(context) is not None:
            self._store.sessions.touch(session)
            await writes.write(kvstore_pb2.AttachReply(heartbeat=True))

    @unary_boundary
    async def Reserve(self, request: kvstore_pb2.ReserveRequest, context: Context) -> kvstore_pb2.ReserveReply:
        lease = await self._store.reserve(request)
        return kvstore_pb2.ReserveReply(lease_id=lease.lease_id, slots=lease.slots, present=lease.present)

    @unary_boundary
    async def Push(self, requests: Any, context: Context) -> kvstore_pb2.PushReply:
        first = await read_next(context)
        if first is None or not first.lease_id:
            raise InvalidRequest("the first message of Push must carry lease_id")
        ending = self._store.ending(first.lease_id)
        num_bytes = await until_ended(self._receive(first, context), ending)
        return kvstore_pb2.PushReply(num_bytes=num_bytes or 0)

    async def _receive(self, message: Any, context: Context) -> int:
        lease_id, num_bytes = message.lease_id, 0
        while message is not None:
            if message.num_blocks:
                num_bytes += self._store.push(lease_id, message)
            message = await read_next(context)
        return num_bytes

    @unary_boundary
    async def Seal(self, request: kvstore_pb2.SealRequest, context: Context) -> kvstore_pb2.SealReply:
        self._store.seal(request)
        return kvstore_pb2.SealReply()

    @unary_boundary
    async def Fetch(self, request: kvstore_pb2.FetchRequest, context: Context) -> None:
        deadline = asyncio.get_running_loop().time() + seconds(request.deadline_s, "deadline_s")
        if not request.without_data:
            keep_pages()  # slices go as messages
        lease = await self._store.open_fetch(request, deadline)
        try:
            ending = self._store.ending(lease.lease_id)
            writes = WholeWrites(context)
            await until_ended(self._send(lease, deadline, writes), ending, writes.close)
            await asyncio.wait({ending})
        except asyncio.CancelledError:
            self._store.release(lease.lease_id)
            raise
        except HalfmoonError as error:
            self._store.end_lease(lease.lease_id, error)
            # the client may not have read the layout yet, and has to release this lease all the same
            named = build_error(error.code, error.message, error.fields_json)
            named.fields["lease_id"] = lease.lease_id
            raise named from error

    async def _send(self, lease: Lease, deadline: float, stream: WholeWrites) -> None:
        layout = kvstore_pb2.FetchReply.Layout(
            lease_id=lease.lease_id,
            slots=lease.slots,
            block_keys=lease.block_keys,
            num_blocks=len(lease.slots),
            ssd_wait_s=lease.ssd_wait_s,
            num_ssd_blocks=lease.num_ssd_blocks,
        )
        await stream.write(kvstore_pb2.FetchReply(layout=layout))
        async for found in self._store.slices(lease, deadline):
            await stream.write(kvstore_pb2.FetchReply(slice=found))
        await stream.write(kvstore_pb2.FetchReply(sealed=self._store.sealed(lease)))

    @unary_boundary
    async def Abort(self, request: kvstore_pb2.AbortRequest, context: Context) -> kvstore_pb2.AbortReply:
        handoff_id = HandoffId(request.handoff.id, request.handoff.epoch)
        return kvstore_pb2.AbortReply(found=self._store.abort(handoff_id, error_from_proto(request.reason)))

    @unary_boundary
    async def Release(self, request: kvstore_pb2.ReleaseRequest, context: Context) -> kvstore_pb2.ReleaseReply:
        self._store.release(request.lease_id, request.corrupt_blocks)
        return kvstore_pb2.ReleaseReply()

    @unary_boundary
    async def Lookup(self, request: kvstore_pb2.LookupRequest, context: Context) -> kvstore_pb2.LookupReply:
        return kvstore_pb2.LookupReply(**self._store.tiers.lookup(request.block_keys)._asdict())

    @unary_boundary
    async def Watch(self, request: kvstore_pb2.WatchRequest, context: Context) -> None:
        watcher = self._store.feed.watch()
        try:
            while True:
                change = await watcher.next()
                await context.write(kvstore_pb2.WatchReply(**change._asdict()))
        finally:
            self._store.feed.leave(watcher)

    @unary_boundary
    async def Replicate(self, request: kvstore_pb2.ReplicateRequest, context: Context) -> None:
        news, latest = asyncio.Event(), kvstore_pb2.ReplicateReply()

        def tell(reply: kvstore_pb2.ReplicateReply) -> None:
            nonlocal latest
            latest = reply  # who reads slowly hears of the newest: the copy waits for nobody
            news.set()

        async with beside(self._replication.replicate(request, tell)) as copying:
            copying.add_done_callback(lambda _: news.set())
            while await news.wait() and not copying.done():
                news.clear()
                await context.write(latest)
            reply = await copying
        await context.write(reply)

    @unary_boundary
    async def Promote(self, request: kvstore_pb2.PromoteRequest, context: Context) -> kvstore_pb2.PromoteReply:
        return kvstore_pb2.PromoteReply(**(await self._store.promote(request.block_keys))._asdict())

    @unary_boundary
    async def Stats(self, request: kvstore_pb2.StatsRequest, context: Context) -> kvstore_pb2.StatsReply:
        return self._store.stats()
