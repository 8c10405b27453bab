"""BlockReader: one lease to read. Nothing counts as read before every layer of every block came and every checksum matched.

Fetch stream ─► layout ─► slice … slice ─► sealed (checksums, state) ─► stays open until release
                             │  over data connections a note a slice: read on threads, a few ahead of who takes them
                             └─► hashed block by block, layer by layer, beside whoever copies the slices
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any, NamedTuple

from ..protocol.errors import HandoffCorrupt, HandoffIncomplete, InvalidRequest, LeaseExpired, StoreUnavailable
from ..protocol.schema import KVSchema
from ..protocol.tasks import untaken
from ..protocol.v1 import common_pb2, kvstore_pb2
from .block_rows import BlockRows
from .checksums import Checksums
from .connection import Connection
from .progress import Progress
from .transport import Transport

logger = logging.getLogger(__name__)

MAX_AHEAD = 3  # slices that are read and not taken yet


class BlockSlice(NamedTuple):
    """Layers from layer on of a run of blocks; with its bytes in the message one."""

    layer: int
    first_block: int
    blocks: BlockRows  # uint8 [num_layers * layer_bytes] each, read-only, valid until release
    num_layers: int = 1

    def behind(self, num_blocks: int) -> BlockSlice | None:
        """What it has of the blocks behind the first num_blocks of all; None: nothing."""
        if num_blocks <= self.first_block:
            return self
        blocks = self.blocks.behind(num_blocks - self.first_block)
        return BlockSlice(self.layer, num_blocks, blocks, self.num_layers) if len(blocks) else None


class BlockReader:
    """Belongs to the event loop."""

    def __init__(
        self, connection: Connection, transport: Transport, schema: KVSchema, call: Any, layout: kvstore_pb2.FetchReply.Layout, name: str
    ) -> None:
        """name: of what is read, for messages."""
        self.num_blocks = layout.num_blocks
        self.ssd_wait_s, self.num_ssd_blocks = layout.ssd_wait_s, layout.num_ssd_blocks  # as kvstore.proto has them
        self.num_skipped = 0  # leading blocks that are not read
        self.block_keys = list(layout.block_keys)
        self.state: common_pb2.HandoffState | None = None
        self.num_bytes = 0
        self.checksums: list[int] = []  # xxh3-64 of each block, once slices() ended
        self._connection = connection
        self._transport = transport
        self._layer_bytes = schema.layer_bytes
        self._call = call
        self._lease_id = layout.lease_id
        self._slots = list(layout.slots)
        self._name = name
        self._progress = Progress(self.num_blocks, schema.num_layers)
        self._hashes = Checksums(self.num_blocks, schema.layer_bytes)
        self._corrupt_blocks: list[int] = []
        self._released = False
        self._pump: asyncio.Task[None] | None = None

    def skip(self, num_blocks: int) -> None:
        """The first num_blocks are not read, nor verified: the caller has them. Before slices()."""
        self.num_skipped = num_blocks

    async def slices(self) -> AsyncIterator[BlockSlice]:
        """Every layer of every block but the skipped ones, once, as they come; lower layers of a block first.

        Ends when all is there and right.

        Raises HandoffAborted (with the reason), HandoffIncomplete (naming what is missing), HandoffCorrupt (naming the
        blocks), DeadlineExceeded, StoreUnavailable. What was read before an error must not be used.
        """
        events = self._events() if self._transport.threads is None else self._events_ahead()
        async for part, blocks in events:
            if blocks is None:
                await self._hashes.finished()
                self._verify(part)
                await self._connection.confirm()
                self.checksums = list(part.checksums)
                self.state = part.state if part.HasField("state") else None
                return
            piece = BlockSlice(part.layer, part.first_block, blocks, max(part.num_layers, 1)).behind(self.num_skipped)
            if piece is not None:
                self._hashes.add(piece.first_block, piece.blocks)
                self.num_bytes += len(piece.blocks) * piece.num_layers * self._layer_bytes
                yield piece

    async def release(self) -> None:
        """Lets go of the blocks: no slice may be touched any more. A hand-off is over with it. Idempotent."""
        if self._released:
            return
        self._released = True
        if self._pump is not None:
            self._pump.add_done_callback(untaken)
            self._pump.cancel()
        request = kvstore_pb2.ReleaseRequest(lease_id=self._lease_id, corrupt_blocks=self._corrupt_blocks)
        try:
            await self._connection.call(self._connection.stub.Release, request)
        except StoreUnavailable:
            logger.debug("the store of %s is gone, and its leases with it", self._name)
        finally:
            self._call.cancel()

    async def _next(self) -> tuple[Any, list[int] | None]:
        """The next slice and its slots, or what the seal says and None."""
        event = await self._connection.read(self._call)
        if event is None:
            self._progress.require_complete(self._name)
            raise HandoffIncomplete(f"{self._name}: the stream ended before the seal")
        if event.WhichOneof("event") == "sealed":
            return event.sealed, None
        part = event.slice
        try:
            self._progress.record(part.layer, part.first_block, part.num_blocks, max(part.num_layers, 1))
        except InvalidRequest as error:
            raise HandoffIncomplete(f"{self._name} came in the wrong order: {error.message}") from error
        return part, self._slots[part.first_block : part.first_block + part.num_blocks]

    async def _events(self) -> AsyncIterator[tuple[Any, BlockRows | None]]:
        while True:
            part, slots = await self._next()
            yield part, None if slots is None else self._transport.fetch(self._lease_id, slots, part)

    async def _events_ahead(self) -> AsyncIterator[tuple[Any, BlockRows | None]]:
        """As _events; the bytes of the next slices are on their way meanwhile."""
        reads: asyncio.Queue[tuple[Any, Future[BlockRows] | None] | None] = asyncio.Queue()
        room = asyncio.Semaphore(MAX_AHEAD)
        pump = self._pump = self._connection.start(self._read_ahead(reads, room))
        pump.add_done_callback(lambda _: reads.put_nowait(None))
        while (found := await reads.get()) is not None:
            room.release()
            part, read = found
            try:
                yield part, None if read is None else await asyncio.wrap_future(read)
            except LeaseExpired:
                # the data connection knows that the lease is over, and the stream says why
                while await reads.get() is not None:
                    room.release()
                _raise_what_ended(pump, self._connection.peer)
                raise
        _raise_what_ended(pump, self._connection.peer)

    async def _read_ahead(self, reads: asyncio.Queue[Any], room: asyncio.Semaphore) -> None:
        threads = self._transport.threads
        assert threads is not None
        slots: list[int] | None = []
        while slots is not None:
            await room.acquire()
            part, slots = await self._next()
            try:
                read = None if slots is None else threads.submit(self._transport.fetch, self._lease_id, slots, part)
            except RuntimeError:  # the threads are shut down: the client is closed
                raise StoreUnavailable(f"the connection to {self._connection.peer} is closed") from None
            reads.put_nowait((part, read))

    def _verify(self, sealed: kvstore_pb2.FetchReply.Sealed) -> None:
        self._progress.require_complete(self._name)
        if len(sealed.checksums) != self.num_blocks:
            raise HandoffIncomplete(f"{self._name} has {self.num_blocks} blocks and {len(sealed.checksums)} checksums")
        read = range(self.num_skipped, self.num_blocks)
        self._corrupt_blocks = [block for block in read if self._hashes.digest(block) != sealed.checksums[block]]
        if self._corrupt_blocks:
            first = self._corrupt_blocks[0]
            raise HandoffCorrupt(
                f"{self._name} is corrupt: the checksum of block {first} is {self._hashes.digest(first):016x}, it must be "
                f"{sealed.checksums[first]:016x} ({len(self._corrupt_blocks)} of {self.num_blocks} blocks differ)",
                blocks=self._corrupt_blocks,
            )


def _raise_what_ended(pump: asyncio.Task[None], peer: str) -> None:
    """If anything but the end of what it reads did."""
    if pump.cancelled():
        raise StoreUnavailable(f"the connection to {peer} is closed")
    pump.result()
