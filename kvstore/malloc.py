"""glibc's allocator told to keep what messages of a few MiB were in: a fresh page for every 4 KiB of them costs more than their copies."""

from __future__ import annotations

import ctypes
import logging
from functools import cache

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT_BYTES = 64 * 2**20  # free memory that stays with the process
LARGEST_BYTES = 32 * 2**20  # of one allocation; glibc takes no more


@cache
def keep_pages() -> None:
    """For this process, once. Nothing changes where the C library has no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        logger.debug("no mallopt in this C library")
        return
    for option, value in ((M_MMAP_THRESHOLD, LARGEST_BYTES), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_TOP_PAD, KEPT_BYTES)):
        mallopt(option, value)
