"""Replicate: this store fetches leading blocks out of another one and caches them. All of what it asked for or, on an error, nothing.

keys ─► those missing here, as many as fit ─► fetch_prefix at the source ─► slices into reserved slots ─► checksums ─► sealed, announced
           └─ being pulled already: wait for that pull, then look again                 └─ error, cancel, stop: the slots are free again
The bytes come in messages of a few MiB, and the event loop serves everybody else between two of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..protocol.credentials import Credentials
from ..protocol.durations import seconds
from ..protocol.errors import DeadlineExceeded, HalfmoonError, HandoffCorrupt, InvalidRequest, PermissionDenied, StoreUnavailable, shown
from ..protocol.v1 import kvstore_pb2
from .client import StoreClient
from .handoff import Lease
from .reader import BlockReader, BlockSlice
from .store import Store
from .waiters import until_ended

logger = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 5.0
Reply = kvstore_pb2.ReplicateReply
OUTCOMES = {Reply.STOP_COMPLETE: "complete", Reply.STOP_SOURCE: "source", Reply.STOP_NO_ROOM: "no_room"}


@dataclass(slots=True, eq=False)
class Pull:
    ending: asyncio.Future[HalfmoonError | None]  # set from outside: why it has to end
    over: asyncio.Future[None]
    on_progress: Callable[[kvstore_pb2.ReplicateReply], None]
    num_blocks: int = 0  # copied
    num_bytes: int = 0
    num_bytes_wanted: int = 0
    num_ssd_blocks: int = 0
    source_is_short: bool = False

    def reply(self) -> kvstore_pb2.ReplicateReply:
        """How far it is."""
        return Reply(num_bytes=self.num_bytes, num_bytes_wanted=self.num_bytes_wanted, num_ssd_blocks=self.num_ssd_blocks)


class Replication:
    """Belongs to the store's event loop.

    Attributes:
        sources: addresses of the stores that may be copied from. None: all, for a store without a cluster.
    """

    def __init__(self, store: Store, credentials: Credentials | None = None) -> None:
        self.sources: frozenset[str] | None = None if credentials is None else frozenset()
        self._store = store
        self._credentials = credentials
        self._pulls: dict[bytes, Pull] = {}  # by every key that one is fetching
        self._running: set[Pull] = set()

    async def replicate(
        self, request: kvstore_pb2.ReplicateRequest, on_progress: Callable[[kvstore_pb2.ReplicateReply], None] = lambda _: None
    ) -> kvstore_pb2.ReplicateReply:
        """on_progress(how far it is): after each message of bytes; never where another call fetches the blocks.

        Raises PermissionDenied (the source is no store of the cluster), StoreUnavailable (naming the source, or stopping),
        SchemaMismatch, HandoffCorrupt, HandoffIncomplete,
        DeadlineExceeded, InvalidRequest."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        outcome, reply = "cancelled", Reply()
        try:
            async with asyncio.timeout(seconds(request.deadline_s, "deadline_s")):
                reply = await self._replicate(list(dict.fromkeys(request.block_keys)), request.source_address, on_progress)
            outcome = OUTCOMES[reply.stop]
        except TimeoutError as error:
            failure = DeadlineExceeded(f"the blocks were not copied from {request.source_address} within {request.deadline_s:.3g} s")
            outcome = failure.code
            raise failure from error
        except HalfmoonError as error:
            outcome = error.code
            logger.info("replication from %s failed: %s", request.source_address, error.message)
            raise
        finally:
            took_s = loop.time() - began
            self._store.metrics.replicated(outcome, reply.num_blocks, reply.num_bytes, took_s)
        reply.seconds = took_s
        return reply

    def stop(self) -> None:
        """Ends what runs; the store refuses what comes later by itself."""
        for pull in self._running:
            if not pull.ending.done():
                pull.ending.set_result(StoreUnavailable(f"store {self._store.store_id} is stopping"))

    async def _replicate(
        self, block_keys: Sequence[bytes], source: str, on_progress: Callable[[kvstore_pb2.ReplicateReply], None]
    ) -> kvstore_pb2.ReplicateReply:
        if not source:
            raise InvalidRequest("Replicate without a source_address; name a store that holds the blocks", param="source_address")
        if self.sources is not None and source not in self.sources:
            raise PermissionDenied(
                f"{shown(source)} is no store of this cluster, and blocks are copied from its stores alone; `halfmoon status` names them",
                param="source_address",
            )
        wanted = self._store.missing(block_keys)
        while (other := next((self._pulls[key] for key in wanted if key in self._pulls), None)) is not None:
            await asyncio.wait({other.over})
            wanted = self._store.missing(block_keys)
        loop = asyncio.get_running_loop()
        pull = Pull(loop.create_future(), loop.create_future(), on_progress)
        if wanted:
            await self._run(pull, block_keys, wanted, source)
        num_held = self._store.lookup(block_keys)
        stop = Reply.STOP_SOURCE if pull.source_is_short else Reply.STOP_NO_ROOM
        if num_held == len(block_keys):
            stop = Reply.STOP_COMPLETE
        reply = pull.reply()
        reply.num_blocks, reply.num_held, reply.stop = pull.num_blocks, num_held, stop
        return reply

    async def _run(self, pull: Pull, block_keys: Sequence[bytes], wanted: Sequence[bytes], source: str) -> None:
        self._running.add(pull)
        self._pulls.update(dict.fromkeys(wanted, pull))
        try:
            await until_ended(self._pull(pull, block_keys, wanted, source), pull.ending)
        finally:
            for key in set(wanted):
                del self._pulls[key]
            self._running.discard(pull)
            pull.over.set_result(None)

    async def _pull(self, pull: Pull, block_keys: Sequence[bytes], wanted: Sequence[bytes], source: str) -> None:
        schema, name = self._store.schema, f"store {self._store.store_id}"
        assert schema is not None, "missing() has read its content"
        client = await StoreClient.attach(
            source, client_id=name, node_id="", schema=schema, timeout_s=ATTACH_TIMEOUT_S, credentials=self._credentials
        )
        try:
            reader = await client.fetch_prefix(wanted)
            pull.source_is_short, pull.num_ssd_blocks = reader.num_blocks < len(wanted), reader.num_ssd_blocks
            try:
                await self._copy(pull, block_keys, reader, f"{name}, which replicates from {source},")
            except HandoffCorrupt:
                await reader.release()  # says which blocks they are, so that the source drops them
                raise
            await reader.release()
        finally:
            await client.close()  # ends the lease there where it was not released

    async def _copy(self, pull: Pull, block_keys: Sequence[bytes], reader: BlockReader, name: str) -> None:
        schema = self._store.schema
        assert schema is not None, "missing() has read its content"
        lease = self._store.reserve_replica(name, _leading(block_keys, reader.block_keys, self._store))
        try:
            places = _places(lease, reader.block_keys)
            num_blocks = sum(place is not None for place in places)
            if num_blocks == 0:
                return
            layer_bytes, block_bytes = schema.layer_bytes, schema.block_bytes
            pull.num_bytes_wanted = num_blocks * block_bytes
            async for piece in reader.slices():
                for first_block, blocks in _runs(piece, places):
                    self._store.write_replica(lease, piece.layer, piece.num_layers, first_block, blocks)
                    pull.num_bytes += len(blocks) * piece.num_layers * layer_bytes
                pull.on_progress(pull.reply())
            checksums = [0] * len(lease.slots)
            for place, checksum in zip(places, reader.checksums, strict=True):
                if place is not None:
                    checksums[place] = checksum
            self._store.seal_replica(lease, checksums)
            pull.num_blocks = num_blocks
        finally:
            self._store.close_replica(lease)


def _leading(block_keys: Sequence[bytes], coming: Sequence[bytes], store: Store) -> Sequence[bytes]:
    """The leading keys that are held here or come."""
    expected = set(coming)
    num_blocks = 0
    for key in block_keys:
        if key not in expected and not store.holds(key):
            break
        num_blocks += 1
    return block_keys[:num_blocks]


def _places(lease: Lease, coming: Sequence[bytes]) -> list[int | None]:
    """For each block that comes, the lease's block to write; None where it is held by now, or no room is left for it."""
    place_of = {key: index for index, (key, present) in enumerate(zip(lease.block_keys, lease.present, strict=True)) if not present}
    return [place_of.get(key) for key in coming]


def _runs(piece: BlockSlice, places: Sequence[int | None]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The piece's blocks by runs of neighbours in the lease: (first block there, blocks)."""
    first = 0
    run: list[np.ndarray] = []
    for place, block in zip(places[piece.first_block :], piece.blocks, strict=False):
        if run and place != first + len(run):
            yield first, run
            run = []
        if place is not None:
            first = first if run else place
            run.append(block)
    if run:
        yield first, run
