"""What passes over a data connection: KV bytes straight between the arena and a client's memory. Everything else goes over gRPC.

client ── HELLO (the session's data token) ──► store
       ── REQUEST write · bytes ──►    ◄── REPLY
       ── REQUEST read ──►             ◄── REPLY · bytes          one request at a time on a connection
Bytes of a slice: block by block, its layers in order. They are checked by the blocks' checksums, from the writer to the reader.
In a cluster with certificates all of it is inside TLS, and both sides show theirs.
"""

from __future__ import annotations

import enum
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import NamedTuple

MAGIC = b"HALFKV01"
TOKEN_BYTES = 32
HELLO = struct.Struct(f"<8s{TOKEN_BYTES}s")
REPLY = struct.Struct("<BxxxI")  # status, bytes of the message that follows
PIECE_BYTES = 2**20  # of one system call: it stays in a core's cache for the checksum
MAX_MESSAGE_BYTES = 4096
_MAX_BUFFERS = 512  # of one system call; Linux takes 1,024
_REQUEST = struct.Struct("<BxxxIIII32s")


class Op(enum.IntEnum):
    READ = 1
    WRITE = 2


class Status(enum.IntEnum):
    OK = 0
    INVALID = 1  # the request is wrong; a message says why
    GONE = 2  # the lease is over; gRPC says why


class Request(NamedTuple):
    """Layers from layer on of a run of blocks of a lease."""

    op: Op
    lease_id: str
    layer: int
    num_layers: int
    first_block: int
    num_blocks: int

    def pack(self) -> bytes:
        numbers = (self.layer, self.num_layers, self.first_block, self.num_blocks)
        return _REQUEST.pack(self.op, *numbers, self.lease_id.encode())

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Request:
        """Raises ValueError for what is no request."""
        op, layer, num_layers, first_block, num_blocks, lease_id = _REQUEST.unpack(data)
        return cls(Op(op), lease_id.decode("ascii"), layer, num_layers, first_block, num_blocks)


REQUEST_BYTES = _REQUEST.size


class Ended(ConnectionError):
    """The other side closed the connection between two messages."""


def receive(connection: socket.socket, num_bytes: int) -> bytearray:
    """Raises Ended where the connection ends before the first byte, ConnectionError after it."""
    data = bytearray(num_bytes)
    if (found := _fill(connection, memoryview(data))) < num_bytes:
        raise Ended("closed") if found == 0 else ConnectionError("it ended within a message")
    return data


def receive_into(connection: socket.socket, views: Sequence[memoryview]) -> None:
    """Fills the views in order. Raises ConnectionError where the connection ends before that."""
    for batch in _batches(views):
        left = sum(map(len, batch))
        if isinstance(connection, ssl.SSLSocket):
            if sum(_fill(connection, view) for view in batch) < left:
                raise ConnectionError("it ended within a slice")
            continue
        while left:
            found = connection.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]
            if found == 0:
                raise ConnectionError("it ended within a slice")
            left -= found
            batch = _rest(batch, found)


def send_views(connection: socket.socket, views: Sequence[memoryview]) -> None:
    for batch in _batches(views):
        if isinstance(connection, ssl.SSLSocket):
            for view in batch:
                connection.sendall(view)
            continue
        left = sum(map(len, batch))
        while left:
            sent = connection.sendmsg(batch)
            left -= sent
            batch = _rest(batch, sent)


def break_off(connection: socket.socket) -> None:
    """From any thread: both ends fail at once, also one that is in the middle of sending.

    A plain shutdown leaves a sender alone with a window that is closed for good; the reset at the close does not.
    """
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # an SSLSocket's own would have a thread that sends go on in the clear
    except OSError:
        return  # it is closed already


def _fill(connection: socket.socket, view: memoryview) -> int:
    """How many bytes were read: all, or those before the connection's end."""
    if not isinstance(connection, ssl.SSLSocket):
        return connection.recv_into(view, 0, socket.MSG_WAITALL)
    filled = 0
    while filled < len(view) and (found := connection.recv_into(view[filled:])):  # of one TLS record at most
        filled += found
    return filled


def _batches(views: Sequence[memoryview]) -> list[list[memoryview]]:
    """By PIECE_BYTES and _MAX_BUFFERS; views that are larger are cut."""
    batches: list[list[memoryview]] = []
    room = 0
    for view in views:
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            if len(piece) > room or len(batches[-1]) == _MAX_BUFFERS:
                batches.append([])
                room = PIECE_BYTES
            batches[-1].append(piece)
            room -= len(piece)
    return batches


def _rest(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of views after num_bytes."""
    for index, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= len(view)
    return []
