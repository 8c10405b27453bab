"""How a lease's bytes pass between a client and its store: the one seam, with three ways through it.

shm   push: copy into the arena, send a note    rows: views to be written by the caller, then the note    fetch: views of the arena
tcp   push: bytes over a data connection (tcp_transport.py)                                          fetch: into memory used again
grpc  push: slices in messages of a few MiB                                                          fetch: views of the message
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Literal, NamedTuple, Protocol

import numpy as np

from ..protocol.errors import HandoffIncomplete
from ..protocol.v1 import kvstore_pb2
from .arena import ArenaMap
from .block_rows import BlockRows
from .malloc import keep_pages

TransportName = Literal["shm", "tcp", "grpc"]
TransportChoice = Literal["auto", "tcp", "grpc"]

MESSAGE_BYTES = 2 * 2**20  # KV in one gRPC message: it is fastest from 1 to 4 MiB
SLICE_BYTES = 64 * 2**20  # layers read from an arena as one slice: a slice costs the reader the same, however large it is
READ_BYTES = 8 * 2**20  # read over a data connection as one slice
COPY_BYTES = 2**20  # copied at once: what was copied is still in the core's cache when it is hashed


class Piece(NamedTuple):
    """Blocks [start, stop) of a push are handed over, and may be hashed now."""

    start: int
    stop: int
    message: kvstore_pb2.PushRequest | None = None  # tells the store; None where nothing has to, or a later piece's does


class Transport(Protocol):
    @property
    def name(self) -> TransportName: ...

    @property
    def threads(self) -> Executor | None:
        """Where fetch has to be called; None: it does not block."""
        ...

    def push(self, lease_id: str, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[Piece]:
        """Takes one layer of a run of blocks over, piece by piece.

        slots: of these blocks. blocks: uint8 [len(slots), layer_bytes]; the caller's again once the iterator has ended.
        Runs in the caller's thread. Raises LeaseExpired where the store says that the lease is over, StoreUnavailable.
        """
        ...

    @property
    def memory(self) -> np.ndarray | None:
        """The memory that rows() returns views of; None if the transport only takes arrays, and rows() must not be called."""
        ...

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        """The place where the caller writes layers of these blocks itself, instead of push. It then sends a PushRequest without data."""
        ...

    def fetch(self, lease_id: str, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        """The slice's blocks, uint8 [its layers * layer_bytes] each, read-only. Raises HandoffIncomplete where bytes are missing,
        LeaseExpired, StoreUnavailable."""
        ...

    def close(self) -> None:
        """With the session. Blocks until none of the threads runs."""
        ...


class ShmTransport:
    name: TransportName = "shm"
    threads: Executor | None = None

    def __init__(self, arena: ArenaMap) -> None:
        self._arena = arena
        self.memory: np.ndarray | None = arena.memory

    def push(self, lease_id: str, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[Piece]:
        for start, stop in pieces(blocks, COPY_BYTES):
            for slot, block in zip(slots[start:stop], blocks[start:stop], strict=True):
                self._arena.row(slot, layer)[:] = block
            note = kvstore_pb2.PushRequest(layer=layer, first_block=first_block, num_blocks=len(slots)) if stop == len(slots) else None
            yield Piece(start, stop, note)

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        return self._arena.rows(slots, layer, num_layers)

    def fetch(self, lease_id: str, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        rows = self._arena.rows(slots, part.layer, max(part.num_layers, 1))
        for run in rows.runs:
            run.flags.writeable = False
        return rows

    def close(self) -> None:
        pass


class GrpcTransport:
    name: TransportName = "grpc"
    threads: Executor | None = None
    memory: np.ndarray | None = None

    def __init__(self, layer_bytes: int) -> None:
        self._layer_bytes = layer_bytes
        keep_pages()

    def push(self, lease_id: str, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[Piece]:
        for start, stop in pieces(blocks, MESSAGE_BYTES):
            data = blocks[start:stop].tobytes()
            message = kvstore_pb2.PushRequest(layer=layer, first_block=first_block + start, num_blocks=stop - start, data=data)
            yield Piece(start, stop, message)

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        raise RuntimeError("slices go over gRPC as arrays: push them")

    def fetch(self, lease_id: str, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        expected = len(slots) * self._layer_bytes
        if len(part.data) != expected:
            raise HandoffIncomplete(
                f"layer {part.layer} of {len(slots)} blocks from block {part.first_block} came with {len(part.data)} bytes of {expected}"
            )
        return BlockRows([np.frombuffer(part.data, dtype=np.uint8).reshape(len(slots), self._layer_bytes)])

    def close(self) -> None:
        pass


def pieces(blocks: np.ndarray, max_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of runs of at most max_bytes, of one block at least."""
    step = max(1, max_bytes // blocks.shape[1])
    for start in range(0, len(blocks), step):
        yield start, min(start + step, len(blocks))
