"""Takes a hand-off into a sequence's pages, and refuses what must not be decoded.

fetch ─► layout: as many blocks as the tokens make, keys those of the tokens ─► slices ─► sealed: checksums, state
                                                                       └─ transfer thread ─► pages, once granted

Slices of a sequence that waits for pages are held back here; they are bounded by the store's arena, where they stay leased.
"""

from __future__ import annotations

import time
from functools import partial

from ..engine.kv_cache import PagedKVCache
from ..engine.transfer import TransferThread
from ..kvstore.reader import BlockReader, BlockSlice
from ..protocol.blocks import div_ceil
from ..protocol.errors import HandoffCorrupt, HandoffIncomplete
from ..protocol.v1 import common_pb2
from .job import DecodeJob


class HandoffLoader:
    """On the event loop."""

    def __init__(self, cache: PagedKVCache, vocab_size: int, transfer: TransferThread) -> None:
        self._cache = cache
        self._vocab_size = vocab_size
        self._transfer = transfer

    async def load(self, job: DecodeJob, reader: BlockReader) -> common_pb2.HandoffState:
        """Returns once the pages hold the whole hand-off and it was verified.

        Raises HandoffIncomplete, HandoffCorrupt, HandoffAborted, StoreUnavailable.
        """
        unwritten: list[BlockSlice] = []
        num_slices = 0
        async for piece in reader.slices():
            unwritten.append(piece)
            num_slices += len(piece.blocks)
            if job.granted.done():
                await self._write(job, unwritten)
                unwritten = []
        job.sealed_at = time.monotonic()
        state = check_state(job, reader, num_slices, self._cache.schema.num_layers, self._vocab_size)
        await job.granted
        await self._write(job, unwritten)
        return state

    async def _write(self, job: DecodeJob, slices: list[BlockSlice]) -> None:
        await self._transfer.run(partial(self._copy, job.sequence.pages, slices))

    def _copy(self, pages: list[int], slices: list[BlockSlice]) -> None:
        for piece in slices:
            self._cache.write_bytes(piece.layer, pages[piece.first_block : piece.first_block + len(piece.blocks)], piece.blocks)


def check_layout(job: DecodeJob, reader: BlockReader, block_size: int) -> None:
    """Raises HandoffIncomplete or HandoffCorrupt where the hand-off's blocks are not those of the request's tokens."""
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
    """num_slices: layers of blocks that came. Raises HandoffIncomplete, HandoffCorrupt."""
    name = handoff_name(job)
    if num_slices != reader.num_blocks * num_layers:
        raise HandoffIncomplete(
            f"{name} came with {num_slices} layers of blocks; {reader.num_blocks} blocks have {reader.num_blocks * num_layers}",
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
