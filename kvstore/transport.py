"""How a lease's bytes pass between a client and its store: the one seam, with two ways through it.

shm   push: copy into the arena, send a note    fetch: views of the arena
grpc  push: slices in messages of a few MiB     fetch: views of the message
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from ..protocol.errors import HandoffIncomplete
from ..protocol.v1 import kvstore_pb2
from .arena import ArenaMap

MESSAGE_BYTES = 2 * 2**20  # of KV in one message: gRPC is fastest from 1 to 4 MiB


class Transport(Protocol):
    @property
    def name(self) -> Literal["shm", "grpc"]: ...

    def push(self, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[kvstore_pb2.PushRequest]:
        """Takes one layer of a run of blocks over; what it yields tells the store, in order.

        slots: of these blocks. blocks: uint8 [len(slots), layer_bytes]; the caller's again once the iterator has ended.
        Runs in the caller's thread.
        """
        ...

    def fetch(self, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> list[np.ndarray]:
        """The slice's blocks, uint8 [layer_bytes] each, read-only. Raises HandoffIncomplete where bytes are missing."""
        ...


class ShmTransport:
    name: Literal["shm", "grpc"] = "shm"

    def __init__(self, arena: ArenaMap) -> None:
        self._arena = arena

    def push(self, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[kvstore_pb2.PushRequest]:
        for slot, block in zip(slots, blocks, strict=True):
            self._arena.row(slot, layer)[:] = block
        yield kvstore_pb2.PushRequest(layer=layer, first_block=first_block, num_blocks=len(slots))

    def fetch(self, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> list[np.ndarray]:
        rows = [self._arena.row(slot, part.layer).view() for slot in slots]
        for row in rows:
            row.flags.writeable = False
        return rows


class GrpcTransport:
    name: Literal["shm", "grpc"] = "grpc"

    def __init__(self, layer_bytes: int) -> None:
        self._layer_bytes = layer_bytes
        self._max_blocks = max(1, MESSAGE_BYTES // layer_bytes)

    def push(self, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[kvstore_pb2.PushRequest]:
        for start in range(0, len(slots), self._max_blocks):
            part = blocks[start : start + self._max_blocks]
            yield kvstore_pb2.PushRequest(layer=layer, first_block=first_block + start, num_blocks=len(part), data=part.tobytes())

    def fetch(self, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> list[np.ndarray]:
        expected = len(slots) * self._layer_bytes
        if len(part.data) != expected:
            raise HandoffIncomplete(
                f"layer {part.layer} of {len(slots)} blocks from block {part.first_block} came with {len(part.data)} bytes of {expected}"
            )
        return list(np.frombuffer(part.data, dtype=np.uint8).reshape(len(slots), self._layer_bytes))
