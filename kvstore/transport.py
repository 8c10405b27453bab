"""How a lease's bytes pass between a client and its store: the one seam, with two ways through it.

shm   push: copy into the arena, send a note    rows: views to be written by the caller, then the note    fetch: views of the arena
grpc  push: slices in messages of a few MiB                                                               fetch: views of the message
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from ..protocol.errors import HandoffIncomplete
from ..protocol.v1 import kvstore_pb2
from .arena import ArenaMap
from .block_rows import BlockRows

MESSAGE_BYTES = 2 * 2**20  # KV in one message: gRPC is fastest from 1 to 4 MiB
SLICE_BYTES = 64 * 2**20  # layers read from an arena as one slice: a slice costs the reader the same, however large it is


class Transport(Protocol):
    @property
    def name(self) -> Literal["shm", "grpc"]: ...

    def push(self, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[kvstore_pb2.PushRequest]:
        """Takes one layer of a run of blocks over; what it yields tells the store, in order.

        slots: of these blocks. blocks: uint8 [len(slots), layer_bytes]; the caller's again once the iterator has ended.
        Runs in the caller's thread.
        """
        ...

    @property
    def memory(self) -> np.ndarray | None:
        """The memory that rows() returns views of; None if the transport only takes arrays, and rows() must not be called."""
        ...

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        """The place where the caller writes layers of these blocks itself, instead of push. It then sends a PushRequest without data."""
        ...

    def fetch(self, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        """The slice's blocks, uint8 [its layers * layer_bytes] each, read-only. Raises HandoffIncomplete where bytes are missing."""
        ...


class ShmTransport:
    name: Literal["shm", "grpc"] = "shm"

    def __init__(self, arena: ArenaMap) -> None:
        self._arena = arena
        self.memory: np.ndarray | None = arena.memory

    def push(self, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[kvstore_pb2.PushRequest]:
        for slot, block in zip(slots, blocks, strict=True):
            self._arena.row(slot, layer)[:] = block
        yield kvstore_pb2.PushRequest(layer=layer, first_block=first_block, num_blocks=len(slots))

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        return self._arena.rows(slots, layer, num_layers)

    def fetch(self, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        rows = self._arena.rows(slots, part.layer, max(part.num_layers, 1))
        for run in rows.runs:
            run.flags.writeable = False
        return rows


class GrpcTransport:
    name: Literal["shm", "grpc"] = "grpc"
    memory: np.ndarray | None = None

    def __init__(self, layer_bytes: int) -> None:
        self._layer_bytes = layer_bytes
        self._max_blocks = max(1, MESSAGE_BYTES // layer_bytes)

    def push(self, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[kvstore_pb2.PushRequest]:
        for start in range(0, len(slots), self._max_blocks):
            part = blocks[start : start + self._max_blocks]
            yield kvstore_pb2.PushRequest(layer=layer, first_block=first_block + start, num_blocks=len(part), data=part.tobytes())

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        raise RuntimeError("slices go over gRPC as arrays: push them")

    def fetch(self, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        expected = len(slots) * self._layer_bytes
        if len(part.data) != expected:
            raise HandoffIncomplete(
                f"layer {part.layer} of {len(slots)} blocks from block {part.first_block} came with {len(part.data)} bytes of {expected}"
            )
        return BlockRows([np.frombuffer(part.data, dtype=np.uint8).reshape(len(slots), self._layer_bytes)])
