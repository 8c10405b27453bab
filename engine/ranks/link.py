"""A rank's end of a connection with another process: messages of whole numbers over a Unix socket.

[count: uint32][count numbers: int64]      text goes as its bytes, a float as the number with its bits
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence

import numpy as np

_COUNT = struct.Struct("<I")
NUMBER = np.dtype("<i8")


class Link:
    """One thread receives; any thread sends."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._sending = threading.Lock()

    def send(self, numbers: Sequence[int] | np.ndarray) -> None:
        """Raises OSError where the other side is gone."""
        message = np.asarray(numbers, dtype=NUMBER)
        with self._sending:
            self._socket.sendall(_COUNT.pack(len(message)) + message.tobytes())

    def receive(self) -> list[int] | None:
        """The next message; None: the other side is gone."""
        head = self._read(_COUNT.size)
        if head is None:
            return None
        body = self._read(_COUNT.unpack(head)[0] * NUMBER.itemsize)
        return None if body is None else np.frombuffer(body, dtype=NUMBER).tolist()

    def close(self) -> None:
        self._socket.close()

    def _read(self, num_bytes: int) -> bytearray | None:
        found = bytearray(num_bytes)
        view, start = memoryview(found), 0
        while start < num_bytes:
            try:
                count = self._socket.recv_into(view[start:])
            except ConnectionResetError:
                return None
            if count == 0:
                return None
            start += count
        return found


def of_text(text: str) -> list[int]:
    return list(text.encode())


def to_text(numbers: Sequence[int]) -> str:
    return bytes(numbers).decode()


def of_float(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def to_float(number: int) -> float:
    return struct.unpack("<d", struct.pack("<q", number))[0]
