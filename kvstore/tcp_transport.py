"""The transport over data connections: bytes go from the caller's array into the socket, and from the socket into memory used again.

push ─► a lane: request, piece · hash · piece · hash … ─► reply        fetch (on a thread) ─► a lane: request ─► bytes
A connection that breaks is opened once more: both can be repeated. A lease that is over answers so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np

from ..protocol.v1 import kvstore_pb2
from .block_rows import BlockRows
from .data_lanes import DataLanes, read_reply
from .data_wire import Op, Request, receive_into
from .receive_buffers import ReceiveBuffers
from .transport import COPY_BYTES, Piece, TransportName, pieces

logger = logging.getLogger(__name__)

NUM_READS = 2  # of one client at a time: the store sends the next slice while the last one is taken up


class TcpTransport:
    name: TransportName = "tcp"
    memory: np.ndarray | None = None

    def __init__(self, lanes: DataLanes, layer_bytes: int) -> None:
        self._lanes = lanes
        self._layer_bytes = layer_bytes
        self._buffers = ReceiveBuffers()
        self._threads = ThreadPoolExecutor(NUM_READS, thread_name_prefix="store-read")

    @property
    def threads(self) -> Executor | None:
        return self._threads

    def connect(self) -> None:
        """Opens the first connection, so that it is known that one can be. Blocks. Raises OSError."""
        with self._lanes.take():
            logger.debug("a data connection stands")

    def push(self, lease_id: str, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[Piece]:
        request = Request(Op.WRITE, lease_id, layer, 1, first_block, len(blocks))
        told = 0
        for attempt in range(2):
            try:
                with self._lanes.take() as lane:
                    lane.sendall(request.pack())
                    for start, stop in pieces(blocks, COPY_BYTES):
                        lane.sendall(blocks[start:stop].reshape(-1).data)
                        if start >= told:
                            told = stop
                            yield Piece(start, stop)
                    read_reply(lane)
                    return
            except OSError as error:
                if attempt:
                    raise self._lanes.unavailable(error) from error
                logger.info("a push's data connection broke (%s); once more", error)

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        raise RuntimeError("slices go over data connections as arrays: push them")

    def fetch(self, lease_id: str, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        num_layers = max(part.num_layers, 1)
        request = Request(Op.READ, lease_id, part.layer, num_layers, part.first_block, part.num_blocks)
        found = self._buffers.take(part.num_blocks * num_layers * self._layer_bytes)
        for attempt in range(2):
            try:
                with self._lanes.take() as lane:
                    lane.sendall(request.pack())
                    read_reply(lane)
                    receive_into(lane, [found.data])
                    break
            except OSError as error:
                if attempt:
                    raise self._lanes.unavailable(error) from error
                logger.info("a fetch's data connection broke (%s); once more", error)
        rows = found.reshape(part.num_blocks, num_layers * self._layer_bytes)
        rows.flags.writeable = False
        return BlockRows([rows])

    def close(self) -> None:
        self._lanes.close()
        self._threads.shutdown()
