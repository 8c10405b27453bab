"""Loads a hand-off into a sequence's pages, and refuses one that must not be decoded.

Leading blocks that stand in the worker's pages already are not read.

fetch ─► layout: the number of blocks and their keys fit the tokens ─► slices ─► sealed: checksums, state
                                                                       └─ transfers ─► pages, once started

Slices of a sequence that waits for pages are held back here. They stay leased in the store's arena, which bounds them.
"""

from __future__ import annotations

import asyncio
import logging
import time

from ..engine.executor import PageTransfer
from ..engine.page_copy import PageLoad
from ..engine.stores import Stores
from ..engine.worker_metrics import WorkerMetrics
from ..kvstore.reader import BlockReader, BlockSlice
from ..protocol.blocks import div_ceil
from ..protocol.errors import HalfmoonError, HandoffCorrupt, HandoffIncomplete, RequestCancelled
from ..protocol.v1 import common_pb2
from .job import DecodeJob

logger = logging.getLogger(__name__)


class HandoffLoader:
    """Lives on the event loop."""

    def __init__(self, pages: PageTransfer, stores: Stores, metrics: WorkerMetrics, vocab_size: int) -> None:
        self._pages = pages
        self._stores = stores
        self._metrics = metrics
        self._vocab_size = vocab_size

    async def open(self, job: DecodeJob) -> None:
        """Waits for the hand-off to begin, and sets the job's reader.

        Raises HandoffIncomplete, HandoffCorrupt, HandoffAborted, StaleEpoch, DeadlineExceeded, StoreUnavailable.
        """
        handoff = job.request.handoff
        client = job.client = await self._stores.attached(job.request.store_address)
        job.reader = await client.fetch(handoff.id, handoff.epoch, job.sequence.remaining_s)
        if not job.ended:
            check_layout(job, job.reader, self._pages.schema.block_size)

    async def load(self, job: DecodeJob) -> common_pb2.HandoffState:
        """Returns once the pages hold the whole hand-off and it is verified.

        Raises HandoffIncomplete, HandoffCorrupt, HandoffAborted, StoreUnavailable.
        """
        assert job.reader is not None
        load = PageLoad(self._pages)
        if job.started.done():
            job.reader.skip(self._num_shared(job))
        unwritten: list[BlockSlice] = []
        num_slices = 0
        async for piece in job.reader.slices():
            unwritten.append(piece)
            num_slices += len(piece.blocks) * piece.num_layers
            if job.started.done():
                await self._write(load, job, unwritten)
        job.sealed_at = time.monotonic()
        state = check_state(job, job.reader, num_slices, self._pages.schema.num_layers, self._vocab_size)
        await job.started
        await self._write(load, job, unwritten)
        await load.finished()
        return state

    def count(self, job: DecodeJob) -> None:
        """Counts the transfer of a job that was admitted."""
        assert job.client is not None and job.reader is not None
        self._metrics.transferred(job.client.transport, "fetch", job.reader.num_bytes, job.phases().intake_s)

    async def abort(self, job: DecodeJob) -> None:
        """Aborts the hand-off with the job's reason. Called before the intake ends, or the store would have to make up a reason.

        Raises StoreUnavailable.
        """
        handoff = job.request.handoff
        reason = job.error or RequestCancelled(f"request {job.sequence.request_id} was stopped before its hand-off was there")
        client = await self._stores.client(job.request.store_address)
        await client.abort(handoff.id, handoff.epoch, reason)
        job.aborted = True

    async def end_intake(self, job: DecodeJob) -> None:
        """Ends the intake, and returns when it is over."""
        if job.intake is None:
            return
        if job.reader is not None or not job.aborted:
            job.intake.cancel()
        # else the store tells its fetch of the abort, and it may have a lease to release; cancelling it now would lose that
        await asyncio.wait({job.intake})

    async def release(self, job: DecodeJob) -> None:
        """Releases the job's reader, if it has one. Idempotent."""
        if job.reader is None:
            return
        await self._pages.drained()  # a cancelled intake may still be copying out of the reader's memory
        try:
            await job.reader.release()
        except HalfmoonError as error:
            logger.warning("a hand-off's lease could not be released: %s", error)

    async def _write(self, load: PageLoad, job: DecodeJob, unwritten: list[BlockSlice]) -> None:
        num_shared = self._num_shared(job)
        for piece in unwritten:
            new = piece.behind(num_shared)
            if new is not None:
                await load.write(job.sequence.pages, new)
        unwritten.clear()

    def _num_shared(self, job: DecodeJob) -> int:
        """Leading blocks that others use, too. Of a job that has its pages and is not admitted."""
        return job.sequence.num_computed_tokens // self._pages.schema.block_size


def check_layout(job: DecodeJob, reader: BlockReader, block_size: int) -> None:
    """Raises HandoffIncomplete or HandoffCorrupt if the hand-off's blocks do not match the request's tokens."""
    num_tokens = job.sequence.num_tokens
    expected = div_ceil(num_tokens, block_size)
    name = handoff_name(job)
    if reader.num_blocks != expected:
        raise HandoffIncomplete(
            f"{name} has {reader.num_blocks} blocks; the request's {num_tokens} tokens make {expected} of {block_size}",
            num_blocks=reader.num_blocks,
            expected=expected,
        )
    if len(reader.block_keys) != len(job.block_keys):
        raise HandoffIncomplete(
            f"{name} has {len(reader.block_keys)} block keys; the request's {num_tokens} tokens have {len(job.block_keys)} full blocks",
            num_keys=len(reader.block_keys),
            expected=len(job.block_keys),
        )
    for block, (found, own) in enumerate(zip(reader.block_keys, job.block_keys, strict=True)):
        if found != own:
            raise HandoffCorrupt(
                f"{name} holds other tokens than the request from block {block} on: its key is {found.hex()}, the request's {own.hex()}",
                block=block,
            )


def check_state(job: DecodeJob, reader: BlockReader, num_slices: int, num_layers: int, vocab_size: int) -> common_pb2.HandoffState:
    """num_slices: received layers of blocks. Raises HandoffIncomplete, HandoffCorrupt."""
    name = handoff_name(job)
    num_read = reader.num_blocks - reader.num_skipped
    if num_slices != num_read * num_layers:
        raise HandoffIncomplete(
            f"{name} came with {num_slices} layers of blocks; {num_read} blocks have {num_read * num_layers}",
            num_slices=num_slices,
        )
    if reader.state is None or not reader.state.HasField("first_token"):
        raise HandoffIncomplete(f"{name} was sealed without its state or first token")
    if reader.state.num_tokens != job.sequence.num_tokens:
        raise HandoffIncomplete(
            f"{name} holds the KV of {reader.state.num_tokens} tokens; the request has {job.sequence.num_tokens}",
            num_tokens=reader.state.num_tokens,
            expected=job.sequence.num_tokens,
        )
    if reader.state.first_token.token_id >= vocab_size:
        raise HandoffCorrupt(f"{name} brings token {reader.state.first_token.token_id} as its first; the model has {vocab_size} tokens")
    return reader.state


def handoff_name(job: DecodeJob) -> str:
    return f"hand-off {job.request.handoff.id} epoch {job.request.handoff.epoch}"
