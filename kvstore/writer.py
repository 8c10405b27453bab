"""BlockWriter: one lease to write. Slices come from an engine's thread, notes and bytes leave through the event loop.

push ─► transport.push ─► checksum ─► queue (bounded in bytes) ─► loop: Push stream ─► seal: checksums, state
rows ─► the caller copies ─► pushed ─┘                              └─► lease gone: failed, push, rows and pushed raise

Between rows and pushed a copy is under way: a lease that is lost meanwhile keeps its slots until pushed, or dropped, says it is over.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import grpc.aio
import numpy as np

from ..protocol.errors import HalfmoonError, InvalidRequest, LeaseExpired, RequestCancelled, StoreUnavailable
from ..protocol.grpc_errors import error_to_proto
from ..protocol.schema import KVSchema
from ..protocol.tasks import beside
from ..protocol.v1 import common_pb2, kvstore_pb2
from .block_rows import BlockRows
from .checksums import Checksums
from .connection import Connection
from .progress import Progress
from .transport import Transport

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 64 * 2**20


class BlockWriter:
    """push, rows, pushed, dropped: any thread but the event loop's. The coroutines: the event loop."""

    def __init__(
        self,
        connection: Connection,
        transport: Transport,
        schema: KVSchema,
        reply: kvstore_pb2.ReserveReply,
        handoff_id: common_pb2.HandoffId | None,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        self.num_blocks = len(reply.slots)
        self.present = list(reply.present)
        self.num_bytes = 0
        self.failed: HalfmoonError | None = None
        self._connection = connection
        self._transport = transport
        self._layer_bytes = schema.layer_bytes
        self._lease_id = reply.lease_id
        self._handoff_id = handoff_id
        self._slots = list(reply.slots)
        self._progress = Progress(self.num_blocks, schema.num_layers, self.present)
        self._hashes = Checksums(self.num_blocks, schema.layer_bytes)
        self._max_queued_bytes = max_queued_bytes
        self._pushing = threading.Lock()  # one slice at a time: the layers of a block stay in order
        self._changed = threading.Condition()  # guards the six below
        self._queue: deque[kvstore_pb2.PushRequest | None] = deque()  # None: no more
        self._num_queued_bytes = 0
        self._num_copying = 0
        self._is_ended = False  # the end of the stream was queued
        self._is_released = False
        self._needs_ack = False  # released, except that a push still copies: the store is told when that is over
        self._filled = asyncio.Event()
        self._loop_thread = threading.get_ident()
        self._stream = connection.spawn(self._run(), "pushing")

    def push(self, layer: int, first_block: int, blocks: np.ndarray) -> None:
        """Takes one layer of blocks first_block.. over; the array is the caller's again on return.

        blocks: uint8 [n, layer_bytes]; those of present blocks are ignored. The layers of a block come in ascending order.
        Blocks while too many bytes wait for the wire. Raises `failed` once the lease is gone, ValueError for a wrong shape,
        InvalidRequest for a slice outside or out of order.
        """
        if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != self._layer_bytes:
            raise ValueError(f"blocks are {blocks.dtype} {list(blocks.shape)}; they must be uint8 [n, {self._layer_bytes}]")
        with self._pushing:
            self._begin_copying()
            try:
                for start, stop in _runs(self.present[first_block : first_block + len(blocks)], len(blocks)):
                    self._push_run(layer, first_block + start, np.ascontiguousarray(blocks[start:stop]))
            finally:
                self._end_copying()

    @property
    def memory(self) -> np.ndarray | None:
        """The memory that rows() returns views of; None if slices have to be pushed as arrays."""
        return self._transport.memory

    def rows(self, layer: int, first_block: int, last_block: int, num_layers: int = 1) -> BlockRows:
        """The place where the caller itself writes num_layers layers of blocks [first_block, last_block), instead of push. None of the
        blocks may be present. uint8 [num_layers * layer_bytes] a block.

        pushed() or dropped() has to follow once no copy into the rows is under way any more; several may be open at a time.
        Raises `failed` once the lease is gone, InvalidRequest for what is outside or present.
        """
        if not 0 <= first_block < last_block <= self.num_blocks or any(self.present[first_block:last_block]):
            raise InvalidRequest(
                f"blocks {first_block}..{last_block - 1} are not all to be written by this lease of {self.num_blocks} blocks"
            )
        rows = self._transport.rows(self._slots[first_block:last_block], layer, num_layers)
        self._begin_copying()
        return rows

    def pushed(self, layer: int, first_block: int, last_block: int, num_layers: int = 1) -> None:
        """The rows are written. The layers of a block come in ascending order; the rows are hashed after this returns.

        Raises `failed` where the lease is gone, InvalidRequest for a slice out of order; the rows are closed in any case.
        """
        with self._pushing:
            try:
                num_blocks = last_block - first_block
                self._progress.check(layer, first_block, num_blocks, num_layers)
                rows = self._transport.rows(self._slots[first_block:last_block], layer, num_layers)
                self._enqueue(kvstore_pb2.PushRequest(layer=layer, first_block=first_block, num_blocks=num_blocks, num_layers=num_layers))
                self._hashes.add(first_block, rows)
                self._record(layer, first_block, num_blocks, num_layers)
            finally:
                self._end_copying()

    def dropped(self) -> None:
        """In pushed's place: what rows() gave holds nothing that counts, and no copy into it is under way."""
        self._end_copying()

    async def seal(self, state: common_pb2.HandoffState) -> None:
        """Sends what is queued, then makes the blocks readable.

        Raises HandoffIncomplete naming what was not pushed (the lease stays open), `failed` where the lease is gone.
        """
        if self.failed is not None:
            raise self.failed
        self._progress.require_complete(self._name)
        self._end_stream()
        try:
            await self._seal(state)
        except asyncio.CancelledError:
            # nobody knows whether the seal arrived: the hand-off is not to be read then
            self._connection.spawn(self.abort(RequestCancelled("the seal was cancelled")), "giving up a seal")
            raise
        except HalfmoonError as error:
            self._fail(error)
            raise

    async def _seal(self, state: common_pb2.HandoffState) -> None:
        await asyncio.wait({self._stream})
        if self.failed is not None:
            raise self.failed
        await self._hashes.finished()
        checksums = [0 if present else self._hashes.digest(block) for block, present in enumerate(self.present)]
        request = kvstore_pb2.SealRequest(lease_id=self._lease_id, state=state, checksums=checksums)
        await self._connection.call(self._connection.stub.Seal, request)

    async def abort(self, reason: HalfmoonError) -> None:
        """Gives the lease up; who waits for the hand-off is told the reason. Idempotent; a lost store has done it already."""
        self._stop(reason)
        if self._handoff_id is not None:
            request = kvstore_pb2.AbortRequest(handoff=self._handoff_id, reason=error_to_proto(reason))
            try:
                await self._connection.call(self._connection.stub.Abort, request)
            except StoreUnavailable:
                logger.debug("the store of %s is gone, and its leases with it", self._name)
        self._release()  # after the Abort: a Release before it would abort the hand-off without the reason
        await asyncio.wait({self._stream})

    @property
    def _name(self) -> str:
        return "the lease" if self._handoff_id is None else f"hand-off {self._handoff_id.id} epoch {self._handoff_id.epoch}"

    def _push_run(self, layer: int, first_block: int, blocks: np.ndarray) -> None:
        self._progress.check(layer, first_block, len(blocks))
        slots = self._slots[first_block : first_block + len(blocks)]
        try:
            for start, stop, message in self._transport.push(self._lease_id, slots, layer, first_block, blocks):
                self._hashes.update(first_block + start, blocks[start:stop])
                if message is not None:
                    self._enqueue(message)
        except LeaseExpired as error:
            raise self._why_ended(error) from error
        except HalfmoonError as error:
            self._broke(error)
            raise
        # only now: a slice that was not handed over completely must not count as pushed
        self._record(layer, first_block, len(blocks))

    def _why_ended(self, error: LeaseExpired) -> HalfmoonError:
        """What the Push stream says of a lease that the data connection found to be over; its word comes, for the store ends the stream."""
        if threading.get_ident() == self._loop_thread:
            return error
        with self._changed:
            self._changed.wait_for(lambda: self.failed is not None)
        assert self.failed is not None
        return self.failed

    def _broke(self, error: HalfmoonError) -> None:
        """Part of a slice was hashed and not handed over: nothing that follows can make the blocks right."""
        self._to_loop(lambda: self._fail(error))

    def _record(self, layer: int, first_block: int, num_blocks: int, num_layers: int = 1) -> None:
        self._progress.record(layer, first_block, num_blocks, num_layers)
        self.num_bytes += num_blocks * num_layers * self._layer_bytes
        if self._progress.is_complete:
            self._end_stream()  # now, so that its round trip is over when the seal comes: a prefill has yet to sample its token

    def _end_stream(self) -> None:
        with self._changed:
            if self._is_ended:
                return
            self._is_ended = True
            self._queue.append(None)
        self._to_loop(self._filled.set)

    def _enqueue(self, message: kvstore_pb2.PushRequest) -> None:
        with self._changed:
            while self._num_queued_bytes and self._num_queued_bytes + len(message.data) > self._max_queued_bytes:
                if threading.get_ident() == self._loop_thread:
                    raise RuntimeError("push has to wait, and would block the event loop it is called on; call it from the engine's thread")
                if self.failed is not None:
                    raise self.failed
                self._changed.wait()
            if self.failed is not None:
                raise self.failed
            self._queue.append(message)
            self._num_queued_bytes += len(message.data)
        self._to_loop(self._filled.set)

    def _begin_copying(self) -> None:
        with self._changed:
            if self.failed is not None:
                raise self.failed
            self._num_copying += 1

    def _end_copying(self) -> None:
        with self._changed:
            self._num_copying -= 1
            if self._num_copying or not self._needs_ack:
                return
            self._needs_ack = False
        self._to_loop(lambda: self._connection.spawn(self._send_release(), "releasing a lease"))

    def _to_loop(self, callback: Any) -> None:
        try:
            self._connection.loop.call_soon_threadsafe(callback)
        except RuntimeError as error:  # the loop is closed
            raise StoreUnavailable(f"the event loop of {self._connection.peer}'s client is closed") from error

    async def _run(self) -> None:
        """The Push stream: open from the start, so that the store can say through it that the lease is gone."""
        try:
            call = self._connection.track(self._connection.stub.Push())
        except HalfmoonError as error:
            self._fail(error)
            return
        async with beside(self._send(call)):
            await self._follow(call)

    async def _follow(self, call: Any) -> None:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            self._fail(self._connection.error(error))
        except asyncio.CancelledError:
            # the call was cancelled with its session, or this task with its connection
            self._fail(StoreUnavailable(f"the connection to {self._connection.peer} is gone"))

    async def _send(self, call: Any) -> None:
        try:
            await call.write(kvstore_pb2.PushRequest(lease_id=self._lease_id))
            while True:
                await self._filled.wait()
                self._filled.clear()
                while self._queue:
                    message = self._queue.popleft()
                    if message is None:
                        await call.done_writing()
                        return
                    await call.write(message)
                    with self._changed:
                        self._num_queued_bytes -= len(message.data)
                        self._changed.notify_all()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream has ended; who awaits the call knows why

    def _fail(self, error: HalfmoonError) -> None:
        self._stop(error)
        self._release()

    def _stop(self, error: HalfmoonError) -> None:
        """No push begins any more, and those that wait give up."""
        with self._changed:
            if self.failed is None:
                self.failed = error
            self._queue.clear()
            self._changed.notify_all()

    def _release(self) -> None:
        """Tells the store once that no copy into the arena is under way, or will be: the slots may be another's."""
        with self._changed:
            if self._is_released:
                return
            self._is_released = True
            self._needs_ack = self._num_copying > 0
        if not self._needs_ack:
            self._connection.spawn(self._send_release(), "releasing a lease")

    async def _send_release(self) -> None:
        try:
            await self._connection.call(self._connection.stub.Release, kvstore_pb2.ReleaseRequest(lease_id=self._lease_id))
        except StoreUnavailable:
            logger.debug("the store of %s is gone, and its leases with it", self._name)


def _runs(present: Sequence[bool], num_blocks: int) -> list[tuple[int, int]]:
    """[start, stop) of the runs of blocks that are not present."""
    flags = [*present, *([False] * (num_blocks - len(present)))]
    runs: list[tuple[int, int]] = []
    start = 0
    for index, skipped in enumerate([*flags, True]):
        if skipped:
            if index > start:
                runs.append((start, index))
            start = index + 1
    return runs
