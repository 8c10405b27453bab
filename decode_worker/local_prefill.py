"""Local prefill: a prompt without a hand-off. Its cached prefix is loaded, and the scheduler's chunks compute the rest.

add ─► started ─► prefix from the node's store ─► begin_prefill ─► chunks in decode's own steps ─► first token: Admitted, blocks cached
                    └─ corrupt, gone, none: computed
"""

from __future__ import annotations

import time

from ..engine.prefix_loader import PrefixLoader
from ..protocol.v1 import common_pb2
from .job import DecodeJob
from .scheduler import Step


class LocalPrefill:
    """Lives on the event loop, except where a method says otherwise."""

    def __init__(self, prefixes: PrefixLoader) -> None:
        self._prefixes = prefixes
        self._unbegun: dict[object, DecodeJob] = {}  # by sequence: loaded, and not in a step yet
        self._computing: dict[object, DecodeJob] = {}  # begun, and without a first token

    async def load(self, job: DecodeJob) -> None:
        """Sets the job's prefix. Never fails, because what is corrupt or gone is computed."""
        job.prefix = await self._prefixes.load(
            job.sequence, job.block_keys, skip_own_store=job.request.skip_own_store, own_ssd=job.request.own_ssd
        )
        if not job.ended:
            self._unbegun[job.sequence] = job

    def forget(self, job: DecodeJob) -> None:
        """The job has ended."""
        self._unbegun.pop(job.sequence, None)
        self._computing.pop(job.sequence, None)

    def stepping(self, step: Step, now: float) -> None:
        """On the step loop's thread, before a step runs: notes the prefills that begin with it."""
        if not self._unbegun:
            return
        for chunk in step.chunks:
            job = self._unbegun.pop(chunk.sequence, None)
            if job is not None:
                job.first_chunk_at = now
                self._computing[chunk.sequence] = job

    def stepped(self, step: Step, seconds_per_token: float) -> None:
        """On the step loop's thread, before a step is recorded: divides its seconds among the prefills in it."""
        if not self._computing:
            return
        for chunk in step.chunks:
            job = self._computing.get(chunk.sequence)
            if job is not None:
                job.compute_s += seconds_per_token * chunk.num_tokens
                self._prefixes.computed(seconds_per_token, chunk.num_tokens)
                if chunk.is_last:
                    self._computing.pop(chunk.sequence, None)

    def preempted(self, job: DecodeJob) -> None:
        """If the job has no first token yet, its loaded prefix is gone and will be computed."""
        if job.is_local and job.state is None:
            job.prefix.num_tokens = 0


def local_state(job: DecodeJob, token: common_pb2.TokenOutput) -> common_pb2.HandoffState:
    """The state that a hand-off would have brought, as of now. queue_s covers the waits for pages and for the first chunk."""
    now = time.monotonic()
    first_chunk_at = job.first_chunk_at or now
    phases = common_pb2.PrefillPhases(
        queue_s=first_chunk_at - job.arrived_at - job.prefix.load_s,
        prefix_load_s=job.prefix.load_s,
        prefill_s=now - first_chunk_at,
        num_bytes_loaded=job.prefix.num_bytes,
        transport="local",
        compute_s=job.compute_s,
        load_transport=job.prefix.transport,
        ssd_wait_s=job.prefix.ssd_wait_s,
        num_bytes_ssd=job.prefix.num_bytes_ssd,
        ssd_store=job.prefix.ssd_store,
    )
    num_tokens = len(job.request.sequence.token_ids)  # the sequence itself grows on
    num_cached_tokens = job.prefix.num_tokens + job.sequence.num_skipped_tokens
    return common_pb2.HandoffState(num_tokens=num_tokens, num_cached_tokens=num_cached_tokens, first_token=token, phases=phases)
