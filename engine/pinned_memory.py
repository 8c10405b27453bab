"""Host memory that others own, such as a store's arena, and that the device can copy to and from by itself.

pin ─► registered with the driver: copies run at the link's full rate, and the host goes on meanwhile
  └─► refused: copies go through a pinned buffer, slower but just as correct
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

PORTABLE = 1  # cudaHostRegisterPortable: for every context of the process


class PinnedMemory:
    """Usable on any thread. On a CPU it holds nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, torch.Tensor] = {}  # by address: uint8 [num_bytes], which keeps the mapping alive

    def pin(self, memory: np.ndarray) -> bool:
        """Registers contiguous memory. Takes about 0.1 s for each GiB, so not during a request. False if that failed."""
        if self._device.type != "cuda":
            return False
        began = time.monotonic()
        address, gib = _address(memory), memory.nbytes / 2**30
        flat = torch.from_numpy(memory.reshape(-1))
        # in a thread of its own: an error stays that thread's last error, and torch would take it for the next kernel's
        with ThreadPoolExecutor(1) as alone:
            error = alone.submit(_register, self._device, address, memory.nbytes).result()
        if error:
            logger.warning(
                "%.1f GiB of a store's arena can't be pinned (%s), so that copies between it and the GPU are several times slower; "
                "raise the limit of locked memory (ulimit -l, a container's --ulimit memlock=-1) or lower store.arena_bytes",
                gib,
                error,
            )
            return False
        self._held[address] = flat
        logger.info("pinned %.1f GiB of a store's arena in %.2f s", gib, time.monotonic() - began)
        return True

    def release(self, memory: np.ndarray) -> Callable[[], None] | None:
        """Stops new direct copies to or from it. Returns a function to call after those under way are over: it ends the registration, and
        keeps the memory mapped until then. None if the memory was not held."""
        flat = self._held.pop(_address(memory), None)
        return None if flat is None else partial(_unregister, flat)

    def close(self) -> None:
        """To be called when no copy is under way."""
        while self._held:
            _, flat = self._held.popitem()
            _unregister(flat)

    def tensor(self, rows: np.ndarray | None) -> torch.Tensor | None:
        """uint8 rows as a tensor over the same bytes, strides included. None if they are not held here."""
        if rows is None:
            return None
        address = _address(rows)
        for start, flat in list(self._held.items()):
            if start <= address < start + flat.numel():
                return flat.as_strided(rows.shape, rows.strides, address - start)
        return None


def _address(memory: np.ndarray) -> int:
    return memory.__array_interface__["data"][0]


def _register(device: torch.device, address: int, num_bytes: int) -> str:
    """The error's text; empty if there was none."""
    cudart: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        code = cudart.cudaHostRegister(address, num_bytes, PORTABLE)
    return "" if int(code) == 0 else f"cudaHostRegister: {cudart.cudaGetErrorString(code)}"


def _unregister(flat: torch.Tensor) -> None:
    cudart: Any = torch.cuda.cudart()
    with ThreadPoolExecutor(1) as alone:
        code = alone.submit(cudart.cudaHostUnregister, flat.data_ptr()).result()
    if int(code):
        logger.warning("memory at %#x could not be unpinned: %s", flat.data_ptr(), cudart.cudaGetErrorString(code))
