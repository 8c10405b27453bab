"""Caches a sequence's computed blocks in the node's store: a local prompt's as soon as they are ready, all others at the end.

pages ─► transfers ─► store       blocks that are already there, from a hand-off or a prefix, are left out
"""

from __future__ import annotations

import logging
import threading

from ..engine.block_cacher import BlockCacher
from ..engine.stores import Stores
from ..protocol.blocks import block_keys, div_ceil
from ..protocol.errors import HalfmoonError
from .job import DecodeJob
from .scheduler import DecodeScheduler

logger = logging.getLogger(__name__)


class AnswerCacher:
    """Lives on the event loop. changed: guards the scheduler."""

    def __init__(self, blocks: BlockCacher, stores: Stores, scheduler: DecodeScheduler, changed: threading.Condition) -> None:
        self._blocks = blocks
        self._stores = stores
        self._scheduler = scheduler
        self._changed = changed

    async def cache_prompt(self, job: DecodeJob) -> None:
        """Caches the full blocks of a prompt that was computed here, so that other requests find them while it is being answered.

        The sequence goes on meanwhile. If it is preempted or ends, and others write into its pages, nothing is cached.
        Never fails: blocks that are not cached now are cached at the end.
        """
        num_blocks, page_size, sequence = len(job.block_keys), self._scheduler.block_size, job.sequence
        with self._changed:
            pages = sequence.pages[:num_blocks]
            num_preemptions = self._scheduler.num_preemptions(sequence)
            if sequence.num_computed_tokens < num_blocks * page_size or num_blocks <= div_ceil(job.prefix.num_tokens, page_size):
                return  # it was preempted already, or there is nothing new

        def are_held() -> bool:
            with self._changed:
                return sequence.pages[:num_blocks] == pages and self._scheduler.num_preemptions(sequence) == num_preemptions

        try:
            await self._blocks.cache(self._stores.own.client, job.block_keys, pages, are_held)
        except HalfmoonError as failure:
            logger.info("request %s: its prompt's blocks are not cached yet: %s", sequence.request_id, failure)

    async def cache_answer(self, job: DecodeJob, root: bytes) -> None:
        """Caches the full blocks of prompt and answer whose KV was computed, if there is room for them at once.

        Raises StoreFull, StoreUnavailable, HandoffError.
        """
        if keys := computed_keys(job, root, self._scheduler.block_size):
            await self._blocks.cache(self._stores.own.client, keys, job.sequence.pages)


def computed_keys(job: DecodeJob, root: bytes, block_size: int) -> list[bytes]:
    """Keys of the full blocks all of whose tokens have their KV in the pages. The last sampled token never has."""
    num_computed = job.sequence.num_computed_tokens // block_size
    known = job.block_keys[:num_computed]
    rest = job.sequence.token_ids[len(known) * block_size : num_computed * block_size]
    return known + block_keys(root, rest, block_size, parent=known[-1] if known else None)
