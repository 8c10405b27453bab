"""Copies rows between the device and host memory on the current stream, with one strided copy for each run if the runtime can be called.

device   [row][row][row]                  contiguous
host     [row]…[row]…[row]…               one block slot apart, with the blocks' other layers between them
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from .pinned_memory import PinnedMemory

logger = logging.getLogger(__name__)


def to_host(staged: torch.Tensor, runs: Sequence[torch.Tensor]) -> None:
    """staged: uint8 [n, row_bytes] on the device. runs: pinned, n rows in all. They are written when the stream gets there."""
    start = 0
    for run in runs:
        copy_rows(run, staged[start : start + len(run)])
        start += len(run)


def to_device(runs: Sequence[np.ndarray], pinned: PinnedMemory, device: torch.device) -> torch.Tensor:
    """The rows of runs, uint8 [rows of the run, row_bytes] each, as uint8 [n, row_bytes] on the device. Asynchronous for pinned rows,
    which must stay until the stream gets there. Other rows are read at once."""
    staged = torch.empty((sum(map(len, runs)), runs[0].shape[1]), dtype=torch.uint8, device=device)
    start = 0
    for run in runs:
        into = staged[start : start + len(run)]
        source = pinned.tensor(run)
        if source is None:
            buffer = torch.empty(run.shape, dtype=torch.uint8, pin_memory=True)
            buffer.numpy()[:] = run
            into.copy_(buffer, non_blocking=True)  # torch's allocator does not reuse the buffer before this is over
        else:
            copy_rows(into, source)
        start += len(run)
    return staged


def to_buffer(staged: torch.Tensor) -> torch.Tensor:
    """staged, of any shape, in a pinned host tensor. Asynchronous."""
    return torch.empty(staged.shape, dtype=staged.dtype, pin_memory=True).copy_(staged, non_blocking=True)


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """On the current stream. Both are uint8 [n, row_bytes] with contiguous rows, one pinned and the other on the device."""
    runtime = _runtime()
    if runtime is None:
        for into, row in zip(target, source, strict=True):
            into.copy_(row, non_blocking=True)
        return
    num_rows, width = target.shape
    kinds, on_device = runtime.cudaMemcpyKind, target if target.is_cuda else source
    (code,) = runtime.cudaMemcpy2DAsync(
        target.data_ptr(),
        max(target.stride(0), width),
        source.data_ptr(),
        max(source.stride(0), width),
        width,
        num_rows,
        kinds.cudaMemcpyHostToDevice if target.is_cuda else kinds.cudaMemcpyDeviceToHost,
        torch.cuda.current_stream(on_device.device).cuda_stream,
    )
    if code != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"cudaMemcpy2DAsync of {num_rows} rows of {width} bytes failed: {code!r}")


@cache
def _runtime() -> Any | None:
    """CUDA's runtime, for calls that torch lacks. None if it is not installed."""
    try:
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        logger.warning("copies to and from the KV store go row by row (%s); pip install cuda-bindings makes it one a slice", error)
        return None
    return runtime
