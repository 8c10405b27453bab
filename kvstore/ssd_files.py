"""Blocks on an SSD: segment files of equal places, and an index file with a record a place.

index.bin           [magic · schema · key · checksum · sequence · checksum of the record] …      written after the block's bytes
segment-0000.bin    [block 0][block 1] …  each padded to 4 KiB, written and read past the page cache where the filesystem lets us

Nothing is trusted: a record that is torn is none, and bytes that don't match their checksum are never given out. That covers a kill and a
loss of power at any moment, without a sync.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ..protocol.errors import ConfigError

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
SEGMENT_BYTES = 2**30
_RECORD = struct.Struct("<4s4x16s16sQQ")
_RECORD_BYTES = 64
_MAGIC = b"HMB1"


class Record(NamedTuple):
    place: int
    key: bytes
    checksum: int  # xxh3-64 of the block's bytes


class SsdFiles:
    """write, read, forget: any thread, one at a time for a place. Raises OSError where the disk does."""

    def __init__(self, folder: Path, num_bytes: int, block_bytes: int, schema_digest: bytes) -> None:
        """num_bytes: of the segments together. schema_digest: 16 bytes; records of another one are none.

        Raises ConfigError where the folder is another store's, has not that much room, or no block fits num_bytes.
        """
        self.block_bytes = block_bytes
        self._padded_bytes = -(-block_bytes // ALIGNMENT) * ALIGNMENT
        self.num_places = num_bytes // self._padded_bytes
        if self.num_places == 0:
            raise ConfigError(f"store.ssd_bytes is {num_bytes}; one KV block takes {self._padded_bytes} bytes on disk: raise it")
        self._places_a_segment = max(1, SEGMENT_BYTES // self._padded_bytes)
        self._schema = schema_digest
        self._sequence = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._handles: list[int] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._owner = self._open_locked(folder)
            self._index = self._open(folder / "index.bin", self.num_places * _RECORD_BYTES, direct=False)
            self._segments = [
                self._open(folder / f"segment-{number:04d}.bin", size * self._padded_bytes, direct=True)
                for number, size in enumerate(self._segment_sizes())
            ]
        except OSError as error:
            self.close()
            raise ConfigError(f"store.ssd_path {folder} can't hold {num_bytes} bytes ({error.strerror}); lower store.ssd_bytes") from error
        except BaseException:
            self.close()
            raise

    def records(self) -> list[Record]:
        """What stands here from before, the latest written last. Of a key twice the later one counts."""
        data = os.pread(self._index, self.num_places * _RECORD_BYTES, 0)
        found: dict[bytes, tuple[int, Record]] = {}
        for place in range(len(data) // _RECORD_BYTES):
            record = data[place * _RECORD_BYTES : (place + 1) * _RECORD_BYTES]
            magic, schema, key, checksum, sequence = _RECORD.unpack_from(record)
            if magic != _MAGIC or schema != self._schema or xxhash.xxh3_64_digest(record[:56]) != record[56:]:
                continue
            if key not in found or found[key][0] < sequence:
                found[key] = (sequence, Record(place, key, checksum))
        self._sequence = max((sequence for sequence, _ in found.values()), default=0)
        return [record for _, record in sorted(found.values())]

    def write(self, place: int, key: bytes, checksum: int, block: np.ndarray) -> None:
        """block: uint8 [block_bytes]."""
        buffer = self._buffer()
        buffer[: self.block_bytes] = block
        handle, offset = self._at(place)
        done = 0
        while done < self._padded_bytes:
            done += os.pwrite(handle, buffer[done:].data, offset + done)
        with self._lock:
            self._sequence += 1
            record = _RECORD.pack(_MAGIC, self._schema, key, checksum, self._sequence)
        os.pwrite(self._index, record + xxhash.xxh3_64_digest(record), place * _RECORD_BYTES)

    def read(self, place: int, checksum: int, block: np.ndarray) -> bool:
        """Into block, uint8 [block_bytes]. False, and block is as it was, where the bytes do not match the checksum."""
        buffer = self._buffer()
        handle, offset = self._at(place)
        done = 0
        while done < self._padded_bytes:
            found = os.preadv(handle, [buffer[done:].data], offset + done)
            if found == 0:
                return False
            done += found
        if xxhash.xxh3_64_intdigest(buffer[: self.block_bytes].data) != checksum:
            return False
        block[:] = buffer[: self.block_bytes]
        return True

    def forget(self, place: int) -> None:
        os.pwrite(self._index, bytes(_RECORD_BYTES), place * _RECORD_BYTES)

    def close(self) -> None:
        """After the last call of the others."""
        handles, self._handles = self._handles, []
        for handle in handles:
            os.close(handle)

    def _segment_sizes(self) -> list[int]:
        """Places of each."""
        whole, rest = divmod(self.num_places, self._places_a_segment)
        return [self._places_a_segment] * whole + ([rest] if rest else [])

    def _at(self, place: int) -> tuple[int, int]:
        segment, index = divmod(place, self._places_a_segment)
        return self._segments[segment], index * self._padded_bytes

    def _buffer(self) -> np.ndarray:
        """The thread's own, page-aligned as direct I/O asks for."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.frombuffer(mmap.mmap(-1, self._padded_bytes), dtype=np.uint8)
        return self._local.buffer

    def _open_locked(self, folder: Path) -> int:
        handle = self._keep(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"store.ssd_path {folder} is another store's; give each its own folder") from error
        return handle

    def _open(self, path: Path, num_bytes: int, *, direct: bool) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            handle = self._keep(os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            logger.info("%s is on a filesystem without direct I/O; using the page cache", path)
            handle = self._keep(os.open(path, flags, 0o600))
        if os.fstat(handle).st_size > num_bytes:
            os.ftruncate(handle, num_bytes)
        os.posix_fallocate(handle, 0, num_bytes)
        return handle

    def _keep(self, handle: int) -> int:
        self._handles.append(handle)
        return handle
