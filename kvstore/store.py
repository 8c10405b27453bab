"""The store in one event loop: the manager, the arena's bytes, who waits, what expires. Knows protobuf values, not gRPC.

service.py ─► Store ─► LeaseManager        what may happen
                │  ◄── Observer      what happened: wakes Waiters, ends leases, feeds watchers and metrics
                └─► ArenaMap         the bytes
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

import numpy as np

from ..protocol.config import StoreConfig
from ..protocol.durations import seconds
from ..protocol.errors import DeadlineExceeded, HalfmoonError, InvalidRequest, RequestCancelled, StoreFull, StoreUnavailable
from ..protocol.schema import DTYPE_BYTES, KVSchema
from ..protocol.v1 import common_pb2, kvstore_pb2
from .arena import Arena, ArenaMap
from .data_server import DataServer
from .data_wire import Op, Request
from .eviction import create_eviction_policy
from .handoff import Handoff, HandoffId, Lease, aborted
from .lease_manager import Accounting, LeaseManager, check_keys
from .metrics import StoreMetrics
from .progress import SliceCursor
from .reserve_queue import ReserveQueue
from .sessions import HEARTBEAT_SHARE, Session, Sessions
from .slot_access import SlotAccess
from .ssd_tier import Promotion
from .tiers import Tiers
from .transport import MESSAGE_BYTES, READ_BYTES, SLICE_BYTES
from .waiters import Waiters

logger = logging.getLogger(__name__)

_IDLE = "idle"


class Store:
    """Every method but stats() belongs to the event loop's thread."""

    def __init__(self, config: StoreConfig, arena: Arena, *, store_id: str, node_id: str, schema: KVSchema | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._access = SlotAccess(self._post)
        self.store_id = store_id
        self.node_id = node_id
        self.schema: KVSchema | None = None
        self.sessions = Sessions(config.lease_ttl_s, self._session_ended)
        self.metrics = StoreMetrics(self.stats)
        self.tiers = Tiers(config, self.metrics.moved)
        self.feed = self.tiers.feed
        self.data = DataServer(self._access, self._layout, self._moved)
        self._config = config
        self._arena = arena
        self._leases: LeaseManager | None = None
        self._map: ArenaMap | None = None
        self._waiters = Waiters()
        self._reserving = ReserveQueue(self._waiters.notify)
        self._endings: dict[str, asyncio.Future[HalfmoonError | None]] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._phase: Literal["running", "draining", "stopped"] = "running"
        self._num_bytes_pushed = 0
        self._num_bytes_fetched = 0
        create_eviction_policy(config.eviction)  # a wrong name is told at start, not at the first Attach
        if schema is not None:
            self._format(schema)

    # sessions

    def attach(self, hello: kvstore_pb2.AttachRequest.Hello) -> tuple[Session, kvstore_pb2.AttachReply.Welcome]:
        """Raises SchemaMismatch, InvalidRequest (no schema), ConfigError (no block of it fits the arena), StoreUnavailable (stopping)."""
        self._require_running()
        theirs = KVSchema.from_proto(hello.schema)
        if theirs.dtype not in DTYPE_BYTES or theirs.block_bytes == 0:
            raise InvalidRequest(
                f"{hello.client_id} has {theirs}, whose blocks have no size; its dtype must be one of {', '.join(DTYPE_BYTES)}"
            )
        if self.schema is None:
            self._format(theirs)
        assert self.schema is not None and self._map is not None
        self.schema.require_equal(theirs, f"store {self.store_id}", hello.client_id)
        session = self.sessions.open(hello.client_id)
        shares_arena = bool(hello.node_id) and hello.node_id == self.node_id
        self._manager().open_session(session.session_id, hello.client_id, shares_arena)
        welcome = kvstore_pb2.AttachReply.Welcome(
            session_id=session.session_id,
            store_id=self.store_id,
            lease_ttl_s=self._config.lease_ttl_s,
            heartbeat_interval_s=self._config.lease_ttl_s * HEARTBEAT_SHARE,
        )
        if shares_arena:
            welcome.arena.path = str(self._arena.path)
            welcome.arena.num_bytes = self._arena.num_bytes
            welcome.arena.token = self._arena.token
            welcome.arena.data_offset = self._arena.data_offset
            welcome.arena.slot_bytes = self.schema.block_bytes
            welcome.arena.num_slots = self._map.num_slots
        elif self.data.port:
            welcome.data.port = self.data.port
            welcome.data.token = self.data.open_session(session.session_id)
        return session, welcome

    # writing

    async def reserve(self, request: kvstore_pb2.ReserveRequest) -> Lease:
        """Waits for room until the deadline, in order of arrival; at its deadline it takes room that the first in line can't use yet.

        Raises StoreFull, StaleEpoch, HandoffAborted (while it waited), LeaseExpired, InvalidRequest, StoreUnavailable.
        """
        handoff_id = _handoff_id(request.handoff) if request.purpose == kvstore_pb2.ReserveRequest.PURPOSE_HANDOFF else None
        if handoff_id is None and request.purpose != kvstore_pb2.ReserveRequest.PURPOSE_CACHE:
            raise InvalidRequest("Reserve without a purpose; set PURPOSE_HANDOFF or PURPOSE_CACHE")
        deadline, can_wait = _deadline(request.deadline_s), request.deadline_s > 0
        ticket = self._reserving.join(request.session_id, handoff_id.id if handoff_id else "", request.num_blocks)
        try:
            while True:
                self._require_running()
                if self._reserving.may_go(ticket, can_wait=can_wait):
                    lease = self._manager().try_reserve(request.session_id, handoff_id, request.block_keys, request.num_blocks, deadline)
                    if lease is not None:
                        self._reserving.went(ticket)
                        return self._reserved(lease, deadline)
                else:
                    self._manager().client(request.session_id)  # it may have ended while others went first
                if not can_wait:
                    raise self._full(request, handoff_id)
                can_wait = await self._waiters.wait(ticket, deadline)
                self._raise_if_ended(handoff_id)
        finally:
            self._reserving.leave(ticket)

    def push(self, lease_id: str, message: kvstore_pb2.PushRequest) -> int:
        """Writes a slice, or notes that a client of the arena wrote it. Returns its bytes.

        Raises LeaseExpired, HandoffAborted, InvalidRequest.
        """
        manager, layout = self._manager(), self._layout()
        lease = manager.writer(lease_id)
        num_layers = max(message.num_layers, 1)
        num_bytes = message.num_blocks * num_layers * layout.memory.shape[1]
        in_arena = lease.client.shares_arena and not message.data
        if not in_arena and (num_layers > 1 or len(message.data) != num_bytes):
            raise InvalidRequest(
                f"a slice of {message.num_blocks} blocks and {num_layers} layers with {len(message.data)} bytes; it must have "
                f"{message.num_blocks * layout.memory.shape[1]}, those of one layer"
            )
        slots = manager.push(lease_id, message.layer, message.first_block, message.num_blocks, num_layers)
        if not in_arena:
            width = layout.memory.shape[1]
            data = memoryview(message.data)
            for index, slot in enumerate(slots):
                layout.row(slot, message.layer).data[:] = data[index * width : (index + 1) * width]
        self._num_bytes_pushed += num_bytes
        return num_bytes

    def seal(self, request: kvstore_pb2.SealRequest) -> None:
        """Raises HandoffIncomplete, LeaseExpired, HandoffAborted, InvalidRequest."""
        self._manager().seal(request.lease_id, request.state, request.checksums)

    # reading

    async def open_fetch(self, request: kvstore_pb2.FetchRequest, deadline: float) -> Lease:
        """Waits for the hand-off to be reserved; a prefix never waits.

        Raises StaleEpoch, HandoffAborted (while it waited), DeadlineExceeded, LeaseExpired, InvalidRequest, StoreUnavailable.
        """
        self._require_running(or_draining=True)
        if request.WhichOneof("what") == "prefix":
            promotion = await self.tiers.promote(request.prefix.keys, request.compute_s, request.ssd)
            lease = self._manager().fetch_prefix(request.session_id, request.prefix.keys)
            lease.ssd_wait_s, lease.num_ssd_blocks = promotion
            return self._opened(lease, request.without_data)
        handoff_id = _handoff_id(request.handoff)
        while True:
            lease = self._manager().open_fetch(request.session_id, handoff_id)
            if lease is not None:
                return self._opened(lease, request.without_data)
            if not await self._waiters.wait(handoff_id.id, deadline):
                raise DeadlineExceeded(f"{handoff_id} was not reserved within the fetch's deadline")
            self._require_running(or_draining=True)
            self._raise_if_ended(handoff_id)

    async def slices(self, lease: Lease, deadline: float) -> AsyncIterator[kvstore_pb2.FetchReply.Slice]:
        """Yields what is written already, then what is written next, until the seal. The caller stops it when ending() is set.

        Raises DeadlineExceeded.
        """
        layout = self._layout()
        layer_bytes = layout.memory.shape[1]
        with_data = not (lease.client.shares_arena or lease.without_data)
        max_bytes = SLICE_BYTES if lease.client.shares_arena else READ_BYTES if lease.without_data else MESSAGE_BYTES
        max_blocks = max(1, len(lease.slots) if lease.client.shares_arena else max_bytes // layer_bytes)
        max_rows = 1 if with_data else max_bytes // layer_bytes
        cursor = SliceCursor(lease.progress)
        while True:
            if lease.revoked is not None:
                raise lease.revoked
            while (found := cursor.take(max_blocks, max_rows)) is not None:
                data = b""
                if with_data:
                    slots = lease.slots[found.first_block : found.first_block + found.num_blocks]
                    data = b"".join(layout.row(slot, found.layer).data for slot in slots)
                self._num_bytes_fetched += found.num_blocks * found.num_layers * layer_bytes
                yield kvstore_pb2.FetchReply.Slice(**found._asdict(), data=data)
            if cursor.is_complete and (lease.handoff is None or lease.handoff.is_sealed):
                return
            assert lease.handoff is not None
            handoff_id = lease.handoff.handoff_id
            if not await self._waiters.wait(handoff_id.id, deadline):
                raise DeadlineExceeded(f"{handoff_id} was not sealed within the fetch's deadline; {_how_far(lease.handoff)}")

    async def promote(self, block_keys: Sequence[bytes]) -> Promotion:
        """Leading blocks come up from the SSD. Raises InvalidRequest, StoreUnavailable."""
        self._require_running()
        return await self.tiers.promote(block_keys, 0.0, common_pb2.SSD_USE_LOAD)

    def sealed(self, lease: Lease) -> kvstore_pb2.FetchReply.Sealed:
        if lease.handoff is None:
            return kvstore_pb2.FetchReply.Sealed(checksums=lease.checksums)
        return kvstore_pb2.FetchReply.Sealed(state=lease.handoff.state, checksums=lease.handoff.checksums)

    def ending(self, lease_id: str) -> asyncio.Future[HalfmoonError | None]:
        """Set when the lease ends: None where it was released or sealed, else why it was taken away.

        Raises LeaseExpired, HandoffAborted for a lease that has ended already.
        """
        found = self._endings.get(lease_id)
        if found is None:
            self._manager().writer(lease_id)
            raise AssertionError(f"lease {lease_id} is open and has no ending")
        return found

    def lookup(self, block_keys: Sequence[bytes]) -> int:
        """Leading blocks held, on any tier; each is looked for."""
        return self.tiers.lookup(block_keys, len(block_keys)).num_blocks

    # replicas: blocks that the store itself writes, out of another one (kvstore/replication.py)

    def missing(self, block_keys: Sequence[bytes]) -> list[bytes]:
        """The keys that this store lacks, of as many leading ones as fit. Raises InvalidRequest, StoreUnavailable (stopping)."""
        self._require_running()
        check_keys(block_keys)
        manager = self._manager()
        return [key for key in block_keys[: manager.num_fitting(block_keys)] if manager.content.slot(key) is None]

    def holds(self, block_key: bytes) -> bool:
        return self._manager().content.slot(block_key) is not None

    def reserve_replica(self, name: str, block_keys: Sequence[bytes]) -> Lease:
        """A lease to write as many leading blocks as fit now, in a session of its own that close_replica ends.

        name: the holder's, for errors.
        """
        self._require_running()
        manager = self._manager()
        num_blocks = manager.num_fitting(block_keys)
        session_id = secrets.token_hex(16)
        manager.open_session(session_id, name, shares_arena=False)
        lease = manager.try_reserve(session_id, None, block_keys[:num_blocks], num_blocks, 0.0)
        assert lease is not None, "num_fitting said that there is room"
        return lease

    def write_replica(self, lease: Lease, layer: int, num_layers: int, first_block: int, blocks: Sequence[np.ndarray]) -> None:
        """blocks: uint8 [num_layers * layer_bytes] each. Raises LeaseExpired."""
        slots = self._manager().push(lease.lease_id, layer, first_block, len(blocks), num_layers)
        for row, block in zip(self._layout().rows(slots, layer, num_layers), blocks, strict=True):
            row[:] = block

    def seal_replica(self, lease: Lease, checksums: Sequence[int]) -> None:
        """Its blocks are found by key from now on. Raises HandoffIncomplete, LeaseExpired."""
        self._manager().seal(lease.lease_id, common_pb2.HandoffState(), checksums)

    def close_replica(self, lease: Lease) -> None:
        """Frees what was not sealed. Idempotent."""
        manager = self._manager()
        manager.release(lease.lease_id)
        manager.end_session(lease.client.session_id, "is done")

    # ending

    def abort(self, handoff_id: HandoffId, reason: HalfmoonError) -> bool:
        """True where a hand-off was under way, or somebody waited for it."""
        waited_for = self._waiters.num_waiting(handoff_id.id) > 0
        found = self._manager().abort(handoff_id, reason)
        self._reserving.wake_handoff(handoff_id.id)
        return found or waited_for

    def proxy_left(self) -> None:
        """The proxy began every hand-off. Its calls to the workers end with it, but a sealed hand-off is no worker's any more."""
        if self._leases is not None:
            self._leases.orphan_handoffs(RequestCancelled(f"the proxy that began it has left store {self.store_id}"))

    def release(self, lease_id: str, corrupt_blocks: Sequence[int] = ()) -> None:
        if corrupt_blocks:
            logger.error("blocks %s of lease %s do not match their checksums; they are dropped", list(corrupt_blocks), lease_id)
        self._manager().release(lease_id, corrupt_blocks)

    def end_lease(self, lease_id: str, error: HalfmoonError) -> None:
        self._manager().end_lease(lease_id, error)

    async def drain(self, grace_s: float) -> None:
        """Refuses new work, waits until every lease and hand-off has ended or grace_s has passed, then ends every session."""
        self._phase = "draining"
        self._waiters.notify_all()
        deadline = asyncio.get_running_loop().time() + grace_s
        while not self._is_idle() and await self._waiters.wait(_IDLE, deadline):
            pass
        self._phase = "stopped"
        self._waiters.notify_all()
        self.sessions.end_all("lost its store, which stopped,", self._stopped())
        for timer in self._deadlines.values():
            timer.cancel()

    # what is here

    def accounting(self) -> Accounting:
        """In slots; all zero before the first client attached."""
        return self._leases.accounting() if self._leases else Accounting(0, 0, 0, 0)

    def stats(self) -> kvstore_pb2.StatsReply:
        """Reads counts only, so that a scraping thread may call it."""
        reply = kvstore_pb2.StatsReply(
            store_id=self.store_id,
            num_sessions=len(self.sessions),
            num_bytes_pushed=self._num_bytes_pushed,
            num_bytes_fetched=self._num_bytes_fetched,
        )
        manager, schema = self._leases, self.schema
        if manager is None or schema is None:
            return reply
        slots = manager.accounting()
        reply.num_bytes_arena = slots.num_slots * schema.block_bytes
        reply.num_bytes_leased = slots.num_leased * schema.block_bytes
        reply.num_bytes_cached = slots.num_cached * schema.block_bytes
        reply.num_bytes_free = slots.num_free * schema.block_bytes
        reply.num_leases = manager.num_leases
        reply.num_handoffs = manager.num_handoffs
        reply.num_evicted_blocks = manager.content.num_evicted
        reply.num_expired_leases = manager.num_expired_leases
        reply.num_query_blocks = manager.num_query_blocks
        reply.num_hit_blocks = manager.num_hit_blocks
        places, used = self.tiers.num_ssd_blocks
        reply.num_bytes_ssd, reply.num_bytes_ssd_used = places * schema.block_bytes, used * schema.block_bytes
        reply.schema.CopyFrom(schema.to_proto())
        return reply

    # Observer: what the lease manager reports

    def lease_ended(self, lease_id: str, error: HalfmoonError | None) -> None:
        ending = self._endings.pop(lease_id, None)
        if ending is not None and not ending.done():
            ending.set_result(error)
        self._waiters.notify(_IDLE)

    def handoff_changed(self, handoff_id: str) -> None:
        self._waiters.notify(handoff_id)

    def handoff_ended(self, handoff_id: HandoffId, error: HalfmoonError | None) -> None:
        timer = self._deadlines.pop(handoff_id.id, None)
        if timer is not None:
            timer.cancel()
        if error is not None:
            self.metrics.aborted(str(error.fields.get("reason", error.code)))
            logger.info("%s", error.message)
        self._waiters.notify(_IDLE)

    def when_untouched(self, lease_id: str, then: Callable[[], None]) -> None:
        self._access.close(lease_id, then)

    def room_freed(self) -> None:
        self._reserving.wake_first()
        self.tiers.look()

    def content_changed(self, stored: list[bytes], evicted: list[bytes]) -> None:
        self.metrics.evicted(len(evicted))
        self.tiers.content_changed(stored, evicted)

    # inside

    def _format(self, schema: KVSchema) -> None:
        self._map = self._arena.format(schema.num_layers, schema.layer_bytes)
        policy = create_eviction_policy(self._config.eviction)
        self._leases = LeaseManager(self._map.num_slots, schema.num_layers, policy, time.monotonic, self)
        self.schema = schema
        self.tiers.open(schema, self._leases, self._block)
        logger.info("store %s: %d slots of %d bytes for %s", self.store_id, self._map.num_slots, schema.block_bytes, schema)

    def _block(self, slot: int) -> np.ndarray:
        """All layers of a slot, uint8 [block_bytes]."""
        layout = self._layout()
        return layout.rows([slot], 0, layout.num_layers).runs[0][0]

    def _manager(self) -> LeaseManager:
        if self._leases is None:
            raise InvalidRequest(f"store {self.store_id} holds nothing yet: attach first")
        return self._leases

    def _layout(self) -> ArenaMap:
        assert self._map is not None
        return self._map

    def _require_running(self, *, or_draining: bool = False) -> None:
        if self._phase == "stopped" or (self._phase == "draining" and not or_draining):
            raise StoreUnavailable(f"store {self.store_id} is stopping")

    def _is_idle(self) -> bool:
        return not self._endings and (self._leases is None or self._leases.num_handoffs == 0)

    def _stopped(self) -> StoreUnavailable:
        return StoreUnavailable(f"store {self.store_id} stopped")

    def _session_ended(self, session_id: str, what_happened: str) -> None:
        manager = self._manager()
        before = manager.num_expired_leases
        manager.end_session(session_id, what_happened, self._stopped() if self._phase == "stopped" else None)
        self.data.end_session(session_id)
        self.metrics.expired(manager.num_expired_leases - before)
        self._reserving.wake_session(session_id)

    def _reserved(self, lease: Lease, deadline: float) -> Lease:
        if lease.handoff is not None and deadline != float("inf"):
            handoff_id = lease.handoff.handoff_id
            loop = asyncio.get_running_loop()
            self._deadlines[handoff_id.id] = loop.call_at(deadline, self._handoff_due, handoff_id)
        return self._opened(lease)

    def _opened(self, lease: Lease, without_data: bool = False) -> Lease:
        lease.without_data = without_data
        if not lease.client.shares_arena:
            self._access.open(lease)
        self.tiers.look()
        self._endings[lease.lease_id] = asyncio.get_running_loop().create_future()
        return lease

    def _post(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(callback)

    def _moved(self, request: Request, num_bytes: int) -> None:
        """On a data connection's thread. The loop knows of the slice before the client does, and so before its seal comes."""
        if request.op is Op.WRITE:
            self._post(lambda: self._written(request, num_bytes))

    def _written(self, request: Request, num_bytes: int) -> None:
        try:
            self._manager().push(request.lease_id, request.layer, request.first_block, request.num_blocks, request.num_layers)
        except HalfmoonError as error:
            logger.debug("a slice came too late: %s", error.message)
        else:
            self._num_bytes_pushed += num_bytes

    def _handoff_due(self, handoff_id: HandoffId) -> None:
        manager = self._manager()
        before = manager.num_expired_leases
        manager.expire_handoff(handoff_id)
        self.metrics.expired(manager.num_expired_leases - before)

    def _raise_if_ended(self, handoff_id: HandoffId | None) -> None:
        reason = None if handoff_id is None else self._manager().end_reason(handoff_id)
        if handoff_id is not None and reason is not None:
            raise aborted(handoff_id, reason)

    def _full(self, request: kvstore_pb2.ReserveRequest, handoff_id: HandoffId | None) -> StoreFull:
        slots = self.accounting()
        return StoreFull(
            f"no room for {request.num_blocks} blocks of {handoff_id or 'a cache entry'} within {request.deadline_s:.3g} s: of "
            f"{slots.num_slots} slots {slots.num_leased} are leased, {slots.num_cached} cached, {slots.num_free} free, and "
            f"{len(self._reserving) - 1} other requests wait for room; send less at a time, or raise store.arena_bytes",
            **slots._asdict(),
        )


def _handoff_id(message: common_pb2.HandoffId) -> HandoffId:
    if not message.id:
        raise InvalidRequest("the hand-off has no id")
    return HandoffId(message.id, message.epoch)


def _deadline(deadline_s: float) -> float:
    """On loop.time(), which is time.monotonic()."""
    return asyncio.get_running_loop().time() + seconds(deadline_s, "deadline_s")


def _how_far(handoff: Handoff) -> str:
    progress = handoff.writer.progress
    num_done = int((progress.num_layers_done == progress.num_layers).sum())
    return f"{num_done} of {progress.num_blocks} blocks are written"
