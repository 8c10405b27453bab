"""The sizes that steps are captured in as CUDA graphs. No torch."""

from __future__ import annotations

from collections.abc import Sequence

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sequences of a decode step, and rows that sample of a step with chunks."""
MAX_CAPTURED_ROWS = 2560
"""Of a step with chunks: beyond, it takes the device longer than the host, with or without a graph."""


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Those that batches of up to max_batch sequences meet; larger ones than the largest run without a graph."""
    needed = [size for size in BATCH_SIZES if size < max_batch]
    return (*needed, *BATCH_SIZES[len(needed) : len(needed) + 1]) if max_batch > 0 else ()


def batch_size_for(num_seqs: int, sizes: Sequence[int]) -> int | None:
    """The smallest of sizes, ascending, that holds num_seqs."""
    return next((size for size in sizes if size >= num_seqs), None)
