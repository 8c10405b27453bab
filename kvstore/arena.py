"""The arena: one preallocated file in /dev/shm, mapped by the store and by every client of the node.

token (32 bytes) │ magic │ data_offset slot_bytes num_slots │ … page boundary … │ slot 0 │ slot 1 │ …
                                                               a slot: [layer][k|v][kv_head][token][head_dim]

The owner holds an flock on the file for its life. An arena that nobody locks belongs to a store that was killed; the next
store on the node removes it. (multiprocessing.shared_memory would unlink the file when any client of it ends.)
"""

from __future__ import annotations

import fcntl
import hmac
import logging
import mmap
import os
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..protocol.errors import ConfigError
from .block_rows import BlockRows

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
PREFIX = "halfmoon-arena-"
MAGIC = b"HALFMOON"
TOKEN_BYTES = 32
DATA_OFFSET = mmap.PAGESIZE
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
POPULATE_BYTES = 16 * 2**20  # at once: madvise holds the interpreter meanwhile
_HEADER = struct.Struct(f"<{TOKEN_BYTES}s8sQQQ")


class ArenaMap:
    """The slots of a mapped arena as arrays.

    memory: uint8 [num_slots * num_layers, layer_bytes]; row slot * num_layers + layer is one layer of one block.
    path, offset: of the file, and of memory in it.
    """

    def __init__(self, path: str, mapped: mmap.mmap, data_offset: int, num_slots: int, num_layers: int, layer_bytes: int) -> None:
        num_bytes = num_slots * num_layers * layer_bytes
        flat = np.frombuffer(mapped, dtype=np.uint8, count=num_bytes, offset=data_offset)
        self.memory = flat.reshape(num_slots * num_layers, layer_bytes)
        self.path = path
        self.offset = data_offset
        self.num_slots = num_slots
        self.num_layers = num_layers
        self._mapped = mapped

    def populate(self) -> None:
        """Maps every page now, so that no copy into a slot is held up by a page fault (a third of its time). Not on an event loop."""
        _populate(self._mapped)

    def row(self, slot: int, layer: int) -> np.ndarray:
        """uint8 [layer_bytes], a view. Raises IndexError for a slot or layer outside: rows of neighbours must not be met."""
        if not (0 <= slot < self.num_slots and 0 <= layer < self.num_layers):
            raise IndexError(f"slot {slot}, layer {layer}: the arena has {self.num_slots} slots of {self.num_layers} layers")
        return self.memory[slot * self.num_layers + layer]

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        """num_layers layers of slots, uint8 [num_layers * layer_bytes] each, views by runs of slots that follow each other.

        Raises IndexError as row does.
        """
        for slot in (min(slots), max(slots)) if slots else ():
            self.row(slot, layer)
            self.row(slot, layer + num_layers - 1)
        width = self.memory.shape[1]
        whole = self.memory.reshape(self.num_slots, self.num_layers * width)[:, layer * width : (layer + num_layers) * width]
        runs: list[np.ndarray] = []
        start = 0
        for index in range(1, len(slots) + 1):
            if index < len(slots) and slots[index] == slots[index - 1] + 1:
                continue
            runs.append(whole[slots[start] : slots[index - 1] + 1])
            start = index
        return BlockRows(runs)


class Arena:
    """The owner's side: creates, locks and removes the file."""

    data_offset = DATA_OFFSET

    def __init__(self, num_bytes: int, folder: Path = FOLDER) -> None:
        """num_bytes: for slots. Raises ConfigError where the folder has not that much room."""
        remove_abandoned(folder)
        self.num_bytes = num_bytes
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.path, self._lock = _create_locked(folder)
        try:
            os.posix_fallocate(self._lock, 0, DATA_OFFSET + num_bytes)
            self._mapped = mmap.mmap(self._lock, DATA_OFFSET + num_bytes)
            _populate(self._mapped)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"no room for an arena of {num_bytes} bytes in {folder} ({error.strerror}); lower store.arena_bytes, "
                f"or enlarge {folder} (a container's --shm-size)"
            ) from error

    def format(self, num_layers: int, layer_bytes: int) -> ArenaMap:
        """Divides the arena into slots. Raises ConfigError where not even one fits."""
        slot_bytes = num_layers * layer_bytes
        num_slots = self.num_bytes // slot_bytes
        if num_slots == 0:
            raise ConfigError(f"store.arena_bytes is {self.num_bytes}; one KV block takes {slot_bytes} bytes: raise it")
        _HEADER.pack_into(self._mapped, 0, self.token, MAGIC, DATA_OFFSET, slot_bytes, num_slots)
        return ArenaMap(str(self.path), self._mapped, DATA_OFFSET, num_slots, num_layers, layer_bytes)

    def close(self) -> None:
        """Removes the file; mappings of clients live on until they drop them."""
        if self._lock >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def open_arena(path: str, token: bytes, num_slots: int, num_layers: int, layer_bytes: int) -> ArenaMap:
    """A client's side: maps an arena that its store named.

    Raises OSError where path can't be opened, ValueError where it is not that store's arena (another node of the same
    name, or a container with a /dev/shm of its own).
    """
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mapped = mmap.mmap(handle, 0)
    finally:
        os.close(handle)
    if len(mapped) < _HEADER.size:
        raise ValueError(f"{path} has {len(mapped)} bytes; it is no arena")
    found_token, magic, data_offset, slot_bytes, found_slots = _HEADER.unpack_from(mapped, 0)
    if magic != MAGIC or not hmac.compare_digest(found_token, token):
        raise ValueError(f"{path} is another store's arena")
    if (slot_bytes, found_slots) != (num_layers * layer_bytes, num_slots) or data_offset + slot_bytes * found_slots > len(mapped):
        raise ValueError(f"{path} is formatted as {found_slots} slots of {slot_bytes} bytes; its store said otherwise")
    return ArenaMap(path, mapped, data_offset, num_slots, num_layers, layer_bytes)


def _populate(mapped: mmap.mmap) -> None:
    for start in range(0, len(mapped), POPULATE_BYTES):
        try:
            mapped.madvise(POPULATE_WRITE, start, min(POPULATE_BYTES, len(mapped) - start))
        except OSError as error:
            logger.debug("pages are mapped as they are touched: %s", error)  # an older kernel
            return


def remove_abandoned(folder: Path = FOLDER) -> list[Path]:
    """Removes the arenas whose owner is dead (nobody holds their lock); returns them."""
    removed: list[Path] = []
    for path in folder.glob(f"{PREFIX}*"):
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone in the meantime, or another user's
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
            logger.warning("removed %s: the store that owned it was killed", path)
        except BlockingIOError:
            continue  # its owner lives
        finally:
            os.close(handle)
    return removed


def _create_locked(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / f"{PREFIX}{secrets.token_hex(8)}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # another store's clean-up may have come between open and flock and removed the file
            if os.fstat(handle).st_nlink == 1:
                return path, handle
        except BlockingIOError:
            logger.debug("%s was taken for abandoned while it was being created; trying another name", path)
        os.close(handle)
