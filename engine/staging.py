"""Brings numpy arrays to the device in one copy, side by side in one pinned buffer, and results back.

arrays ─► [ token_ids | positions | … ] pinned ──one copy──► [ token_ids | positions | … ] on the device ─► a view for each
tensor on the device ──one copy──► pinned ─► event ─► the host reads it
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .row_copy import to_buffer

ALIGNMENT = 16
NUM_BUFFERS = 2  # the host fills one while the other's copy may still wait for its turn
DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


def layout(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of byte ranges that follow one another at multiples of ALIGNMENT, and their total size."""
    offsets: dict[str, int] = {}
    end = 0
    for name, num_bytes in sizes.items():
        offsets[name] = end
        end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def pack(arrays: Mapping[str, np.ndarray], buffer: np.ndarray) -> dict[str, int]:
    """Writes the arrays into buffer, which is uint8 and large enough. Returns their offsets."""
    offsets, _ = layout({name: array.nbytes for name, array in arrays.items()})
    for name, array in arrays.items():
        at = offsets[name]
        buffer[at : at + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    return offsets


def read_back(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, once the current stream has computed it.

    Uses pinned memory and an event. A copy to other memory waits inside the driver, and the calls of all other threads wait with it
    (seen on an H200: the copies of a hand-off stood still until the prefill was over).
    """
    if tensor.device.type == "cpu":
        return tensor
    host = to_buffer(tensor)
    copied = torch.cuda.Event()
    copied.record()
    copied.synchronize()
    return host


class Staging:
    """Not thread-safe. The current stream orders the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(NUM_BUFFERS)]
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
        self._next = 0

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Tensors like the arrays (int64, int32 or float32) on the device. Waits only if the copies of both buffers have not begun yet."""
        _, num_bytes = layout({name: array.nbytes for name, array in arrays.items()})
        buffer = self._free_buffer(num_bytes)
        offsets = pack(arrays, buffer.numpy())
        staged = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        staged.copy_(buffer[:num_bytes], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._copied[self._next] = copied
        self._next = (self._next + 1) % NUM_BUFFERS
        return {
            name: staged[offsets[name] : offsets[name] + array.nbytes].view(DTYPES[array.dtype]).view(array.shape)
            for name, array in arrays.items()
        }

    def _free_buffer(self, num_bytes: int) -> torch.Tensor:
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        if len(self._buffers[self._next]) < num_bytes:
            self._buffers[self._next] = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._buffers[self._next]
