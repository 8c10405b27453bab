"""StoreClient: a worker's way into one node's store. It chooses the fastest transport that reaches: shared memory, data connections, gRPC.

attach ─► reserve | cache ─► BlockWriter     fetch | fetch_prefix ─► BlockReader      lookup · abort · watch · stats
       └► lost: the session ended from the other side; every pending call has raised StoreUnavailable
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ..protocol.address import split_address
from ..protocol.credentials import Credentials
from ..protocol.errors import HalfmoonError, RequestCancelled, StoreUnavailable
from ..protocol.grpc_errors import error_to_proto
from ..protocol.schema import KVSchema
from ..protocol.tasks import untaken
from ..protocol.v1 import common_pb2, kvstore_pb2
from .arena import ArenaMap, open_arena
from .connection import Connection
from .data_lanes import DataLanes
from .reader import BlockReader
from .tcp_transport import TcpTransport
from .transport import GrpcTransport, ShmTransport, Transport, TransportChoice, TransportName
from .writer import BlockWriter

logger = logging.getLogger(__name__)


class StoreClient:
    """Every method belongs to the event loop that attached. Only BlockWriter.push is for other threads."""

    def __init__(self, connection: Connection, schema: KVSchema, transport: Transport, arena: ArenaMap | None = None) -> None:
        """Use attach; this is for transports of one's own."""
        self.address = connection.address
        self.store_id = connection.welcome.store_id
        self.lost = connection.lost
        self.arena = arena  # what a worker pins for CUDA; None over gRPC
        self._connection = connection
        self._schema = schema
        self._transport = transport

    @property
    def transport(self) -> TransportName:
        return self._transport.name

    @classmethod
    async def attach(
        cls,
        address: str,
        *,
        client_id: str,
        node_id: str,
        schema: KVSchema,
        transport: TransportChoice = "auto",
        timeout_s: float = 5.0,
        credentials: Credentials | None = None,
    ) -> StoreClient:
        """Opens a session. client_id: as others shall read it in errors ("prefill worker prefill-0").

        transport: auto is shared memory where the store is on node_id and its arena can be mapped here, else data connections (tcp), else
        gRPC; tcp and grpc begin further down. A slower one than could be expected is a warning.
        credentials: that the store asks for.
        Raises Unauthenticated, SchemaMismatch (both sides printed), StoreUnavailable, ConfigError (no block fits the store's arena).
        """
        connection = Connection(address, client_id, credentials)
        await connection.open(node_id if transport == "auto" else "", schema, timeout_s)
        if not connection.welcome.HasField("arena"):
            remote = None if transport == "grpc" else await _connect_data(connection, schema)
            return cls(connection, schema, remote or GrpcTransport(schema.layer_bytes))
        offered = connection.welcome.arena
        try:
            arena = open_arena(offered.path, offered.token, offered.num_slots, schema.num_layers, schema.layer_bytes)
        except (OSError, ValueError) as error:
            logger.warning("%s can't share the arena of %s (%s); using data connections", client_id, connection.peer, error)
            await connection.close()
            return await cls.attach(
                address, client_id=client_id, node_id="", schema=schema, transport="tcp", timeout_s=timeout_s, credentials=credentials
            )
        await asyncio.to_thread(arena.populate)
        return cls(connection, schema, ShmTransport(arena), arena)

    async def reserve(self, handoff_id: str, epoch: int, block_keys: Sequence[bytes], num_blocks: int, deadline_s: float) -> BlockWriter:
        """Space for a hand-off: a block for each key, and one more where the last is partial.

        deadline_s: what is left of the request's time. By then there has to be room, and somebody has to fetch.
        Raises StaleEpoch, StoreFull, HandoffAborted, StoreUnavailable.
        """
        handoff = common_pb2.HandoffId(id=handoff_id, epoch=epoch)
        request = kvstore_pb2.ReserveRequest(
            session_id=self._connection.session_id,
            purpose=kvstore_pb2.ReserveRequest.PURPOSE_HANDOFF,
            handoff=handoff,
            block_keys=block_keys,
            num_blocks=num_blocks,
            deadline_s=deadline_s,
        )
        return self._writer(await self._reserve(request), handoff)

    async def cache(self, block_keys: Sequence[bytes], deadline_s: float) -> BlockWriter:
        """Space for full blocks that are cached at the seal. deadline_s: to wait for room; 0: not at all. Raises StoreFull."""
        request = kvstore_pb2.ReserveRequest(
            session_id=self._connection.session_id,
            purpose=kvstore_pb2.ReserveRequest.PURPOSE_CACHE,
            block_keys=block_keys,
            num_blocks=len(block_keys),
            deadline_s=deadline_s,
        )
        return self._writer(await self._reserve(request), None)

    async def fetch(self, handoff_id: str, epoch: int, deadline_s: float) -> BlockReader:
        """The hand-off, as soon as it is reserved; its slices come as they are written.

        Raises StaleEpoch, HandoffAborted, DeadlineExceeded, StoreUnavailable.
        """
        request = kvstore_pb2.FetchRequest(
            session_id=self._connection.session_id,
            handoff=common_pb2.HandoffId(id=handoff_id, epoch=epoch),
            deadline_s=deadline_s,
        )
        return await self._fetch(request, f"hand-off {handoff_id} epoch {epoch}")

    async def fetch_prefix(
        self, block_keys: Sequence[bytes], compute_s: float = 0.0, ssd: common_pb2.SsdUse = common_pb2.SSD_USE_UNSPECIFIED
    ) -> BlockReader:
        """The longest run of leading keys held here, pinned until release; num_blocks may be 0.

        ssd: whether blocks on SSD are read. Unspecified: where the store predicts that to be faster than compute_s, which is what computing
        one block takes; 0: not known.
        """
        keys = kvstore_pb2.BlockKeys(keys=block_keys)
        request = kvstore_pb2.FetchRequest(session_id=self._connection.session_id, prefix=keys, compute_s=compute_s, ssd=ssd)
        return await self._fetch(request, "the cached prefix")

    async def lookup(self, block_keys: Sequence[bytes]) -> int:
        """How many leading keys are held now, on any tier; nothing is pinned."""
        reply = await self._connection.call(self._connection.stub.Lookup, kvstore_pb2.LookupRequest(block_keys=block_keys))
        return reply.num_blocks

    async def abort(self, handoff_id: str, epoch: int, reason: HalfmoonError) -> bool:
        """Ends this epoch and every earlier one; whoever waits is told the reason. True where there was something to end."""
        handoff = common_pb2.HandoffId(id=handoff_id, epoch=epoch)
        request = kvstore_pb2.AbortRequest(handoff=handoff, reason=error_to_proto(reason))
        return (await self._connection.call(self._connection.stub.Abort, request)).found

    async def replicate(
        self,
        block_keys: Sequence[bytes],
        source_address: str,
        deadline_s: float,
        on_progress: Callable[[kvstore_pb2.ReplicateReply], None] = lambda _: None,
    ) -> kvstore_pb2.ReplicateReply:
        """The store copies what it lacks of the leading blocks out of the store at source_address, and caches it. A cancel gives it up.

        Raises StoreUnavailable (this store or the source), SchemaMismatch, HandoffCorrupt, HandoffIncomplete, DeadlineExceeded:
        nothing is cached then.
        """
        request = kvstore_pb2.ReplicateRequest(block_keys=block_keys, source_address=source_address, deadline_s=deadline_s)
        call = self._connection.track(self._connection.stub.Replicate(request))
        try:
            while (reply := await self._connection.read(call)) is not None:
                if reply.stop:
                    return reply
                on_progress(reply)
            raise StoreUnavailable(f"{self._connection.peer} ended the copy without its result; it is stopping")
        finally:
            call.cancel()

    async def stats(self) -> kvstore_pb2.StatsReply:
        return await self._connection.call(self._connection.stub.Stats, kvstore_pb2.StatsRequest())

    async def watch(self) -> AsyncIterator[kvstore_pb2.WatchReply]:
        """The whole content, then every change, numbered without gaps; a snapshot again where this side was too slow.

        Raises StoreUnavailable when the store is gone.
        """
        call = self._connection.track(self._connection.stub.Watch(kvstore_pb2.WatchRequest()))
        try:
            while (reply := await self._connection.read(call)) is not None:
                yield reply
            raise StoreUnavailable(f"{self._connection.peer} ended the watch; it is stopping")
        finally:
            call.cancel()

    async def close(self) -> None:
        """Detaches; the store ends what this client still holds. Idempotent."""
        try:
            await self._connection.close()
        finally:  # also where the caller is cancelled meanwhile
            if self._transport.threads is not None:
                await asyncio.to_thread(self._transport.close)

    def _writer(self, reply: kvstore_pb2.ReserveReply, handoff: common_pb2.HandoffId | None) -> BlockWriter:
        return BlockWriter(self._connection, self._transport, self._schema, reply, handoff)

    async def _reserve(self, request: kvstore_pb2.ReserveRequest) -> kvstore_pb2.ReserveReply:
        task = self._connection.start(self._connection.call(self._connection.stub.Reserve, request))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                self._connection.raise_if_ended()
            else:
                task.add_done_callback(untaken)
                self._connection.spawn(self._undo(task, request), "undoing a cancelled Reserve")
            raise

    async def _undo(self, task: asyncio.Task[Any], request: kvstore_pb2.ReserveRequest) -> None:
        """The caller of a Reserve was cancelled: what the store grants all the same is given back."""
        try:
            if request.HasField("handoff"):
                reason = RequestCancelled(f"{self._connection.client_id} cancelled its Reserve")
                await self.abort(request.handoff.id, request.handoff.epoch, reason)
            reply = await task
        except HalfmoonError as error:
            logger.debug("a cancelled Reserve ended with %s", error.message)
        else:
            await self._release(reply.lease_id)

    async def _release(self, lease_id: str) -> None:
        try:
            await self._connection.call(self._connection.stub.Release, kvstore_pb2.ReleaseRequest(lease_id=lease_id))
        except StoreUnavailable as error:
            logger.debug("the lease ended with its store: %s", error.message)

    def _release_revoked(self, error: HalfmoonError) -> None:
        """A lease was granted and taken away before its layout was read: the store waits for our word."""
        lease_id = error.fields.pop("lease_id", None)
        if lease_id is not None:
            self._connection.spawn(self._release(lease_id), "releasing a lease")

    async def _read_end(self, call: Any) -> None:
        try:
            await self._connection.read(call)
        except HalfmoonError as error:
            self._release_revoked(error)

    async def _fetch(self, request: kvstore_pb2.FetchRequest, name: str) -> BlockReader:
        request.without_data = self._transport.threads is not None
        call = self._connection.track(self._connection.stub.Fetch(request))
        try:
            event = await self._connection.read(call)
        except HalfmoonError as error:
            self._release_revoked(error)
            raise
        except BaseException:
            if not call.cancel():  # it had ended by itself, and what with was not read
                self._connection.spawn(self._read_end(call), "reading the end of a fetch")
            raise
        if event is None:
            raise StoreUnavailable(f"{self._connection.peer} ended the fetch; it is stopping")
        return BlockReader(self._connection, self._transport, self._schema, call, event.layout, name)


async def _connect_data(connection: Connection, schema: KVSchema) -> TcpTransport | None:
    """None, and a warning, where no data connection can be opened."""
    if not connection.welcome.HasField("data"):
        return None
    offered = connection.welcome.data
    lanes = DataLanes(connection.peer, split_address(connection.address)[0], offered.port, offered.token, connection.tls)
    transport = TcpTransport(lanes, schema.layer_bytes)
    connection.on_end.append(lanes.close)
    try:
        await asyncio.to_thread(transport.connect)
    except OSError as error:
        name, peer = connection.client_id, connection.peer
        logger.warning("%s can't reach data port %d of %s (%s): KV goes over gRPC, which is slower", name, offered.port, peer, error)
    except BaseException:
        await asyncio.shield(connection.close())
        transport.close()
        raise
    else:
        return transport
    await asyncio.to_thread(transport.close)
    return None
