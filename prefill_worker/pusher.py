"""Which blocks of a prompt go to its hand-off, and when: the cached prefix at once, the others with the steps that finish them."""

from __future__ import annotations

from ..engine.executor import BlockPush, PageTransfer
from ..engine.page_copy import layer_groups
from ..engine.sequence import StepChunk
from ..protocol.blocks import div_ceil
from .job import PrefillJob


def finished_blocks(job: PrefillJob, chunk: StepChunk, block_size: int) -> BlockPush:
    """The blocks whose last token this chunk computes. A partial block at the end of the prompt counts as well."""
    return _push(job, chunk.start // block_size, div_ceil(chunk.start + chunk.num_tokens, block_size))


def push_prefix(pages: PageTransfer, job: PrefillJob) -> None:
    """Pushes all layers of the loaded full blocks that the hand-off's store lacks."""
    push = _push(job, 0, job.prefix.num_tokens // pages.schema.block_size)
    for layers in layer_groups(pages.schema, push.last) if push.last else ():
        pages.push([push], layers)


def _push(job: PrefillJob, first: int, last: int) -> BlockPush:
    assert job.writer is not None, "there is no room for the hand-off yet"
    return BlockPush(job.sequence.pages, job.writer, first, last, job)
