"""Local prefill: a prompt that comes without a hand-off. Its cached prefix is loaded, the scheduler's chunks compute the rest.

add ─► granted ─► prefix from the node's store ─► begin_prefill ─► chunks in decode's own steps ─► first token: Admitted, blocks published
                    └─ corrupt, gone, none: computed

As in a prefill worker, computing begins when every slice has arrived and every checksum matched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ..engine.kv_cache import PagedKVCache
from ..engine.page_copy import load_pages
from ..engine.transfer import TransferThread
from ..kvstore.store_link import StoreLink
from ..protocol.errors import HalfmoonError
from ..protocol.v1 import common_pb2
from .job import DecodeJob
from .metrics import DecodeMetrics
from .scheduler import Step

logger = logging.getLogger(__name__)


class LocalPrefill:
    """On the event loop, where nothing else is said.

    Args:
        spawn: runs a coroutine in the background until the worker stops.
        release: lets go of a job's reader once the transfer thread does not touch its memory any more. Idempotent.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        store: StoreLink,
        transfer: TransferThread,
        metrics: DecodeMetrics,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        release: Callable[[DecodeJob], Coroutine[Any, Any, None]],
    ) -> None:
        self._cache = cache
        self._store = store
        self._transfer = transfer
        self._metrics = metrics
        self._spawn = spawn
        self._release = release
        self._unbegun: dict[object, DecodeJob] = {}  # by sequence: loaded, and in no step yet
        self._computing: dict[object, DecodeJob] = {}  # begun, and without a first token

    async def load(self, job: DecodeJob) -> None:
        """Sets the job's num_cached_tokens: less than all of its tokens, for the last one gives the first logits.

        Never fails: a prefix that is corrupt or gone is computed, with a warning and a count. What was corrupt is not in the
        store any more when it returns.
        """
        began = time.monotonic()
        num_blocks = 0
        try:
            if job.block_keys:
                num_blocks = await self._load(job)
        except HalfmoonError as error:
            logger.warning("request %s: its prefix is computed, for loading failed: %s", job.sequence.request_id, error)
            self._metrics.prefix_failed(error.code)
        await asyncio.wait({self._spawn(self._release(job))})
        job.num_cached_tokens = min(num_blocks * self._cache.page_size, job.sequence.num_tokens - 1)
        job.prefix_load_s = time.monotonic() - began
        if not job.ended:
            self._unbegun[job.sequence] = job

    def forget(self, job: DecodeJob) -> None:
        """It has ended."""
        self._unbegun.pop(job.sequence, None)
        self._computing.pop(job.sequence, None)

    def stepping(self, step: Step, now: float) -> None:
        """On the engine's thread, before a step runs: whose prefill begins with it."""
        if not self._unbegun:
            return
        for chunk in step.chunks:
            job = self._unbegun.pop(chunk.sequence, None)
            if job is not None:
                job.first_chunk_at = now
                self._computing[chunk.sequence] = job

    def stepped(self, step: Step, seconds: float) -> None:
        """On the engine's thread, before a step is recorded: what of its seconds was whose."""
        if not self._computing:
            return
        for chunk in step.chunks:
            job = self._computing.get(chunk.sequence)
            if job is not None:
                job.compute_s += seconds * chunk.num_tokens / step.num_tokens
                if chunk.is_last:
                    self._computing.pop(chunk.sequence, None)

    def preempted(self, job: DecodeJob) -> None:
        """Where it has no first token yet: what had been loaded is computed after all."""
        if job.is_local and job.state is None:
            job.num_cached_tokens = 0

    async def _load(self, job: DecodeJob) -> int:
        """Returns how many blocks stand in the pages."""
        client = self._store.client
        began = time.monotonic()
        reader = job.reader = await client.fetch_prefix(job.block_keys)
        page_size = self._cache.page_size
        self._metrics.prefix(len(job.block_keys) * page_size, reader.num_blocks * page_size)
        if reader.num_blocks == 0:
            return 0
        await load_pages(self._cache, self._transfer, job.sequence.pages, reader)
        job.num_bytes_loaded, job.transport = reader.num_bytes, client.transport
        self._metrics.transferred(client.transport, "load", reader.num_bytes, time.monotonic() - began)
        return reader.num_blocks


def local_state(job: DecodeJob, token: common_pb2.TokenOutput) -> common_pb2.HandoffState:
    """What a hand-off would have brought, as of now. queue_s: for pages, and for the first chunk."""
    now = time.monotonic()
    first_chunk_at = job.first_chunk_at or now
    phases = common_pb2.PrefillPhases(
        queue_s=first_chunk_at - job.arrived_at - job.prefix_load_s,
        prefix_load_s=job.prefix_load_s,
        prefill_s=now - first_chunk_at,
        num_bytes_loaded=job.num_bytes_loaded,
        transport="local",
        compute_s=job.compute_s,
        load_transport=job.transport,
    )
    num_tokens = len(job.request.sequence.token_ids)  # the sequence itself goes on growing
    return common_pb2.HandoffState(num_tokens=num_tokens, num_cached_tokens=job.num_cached_tokens, first_token=token, phases=phases)
