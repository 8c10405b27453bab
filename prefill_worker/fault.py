"""A fault for tests: KV that changes on its way to the store, after its checksum was taken. Nothing turns it on by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from ..kvstore.block_rows import BlockRows
from ..kvstore.client import StoreClient
from ..kvstore.transport import Transport
from ..protocol.v1 import kvstore_pb2


class FlippingTransport:
    """Passes everything on, with the first byte of every slice inverted."""

    memory: np.ndarray | None = None  # so that every slice comes as an array

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    @property
    def name(self) -> Literal["shm", "grpc"]:
        return self._inner.name

    def push(self, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[kvstore_pb2.PushRequest]:
        altered = blocks.copy()
        altered[0, 0] ^= 0xFF
        return self._inner.push(slots, layer, first_block, altered)

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        return self._inner.rows(slots, layer, num_layers)

    def fetch(self, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        return self._inner.fetch(slots, part)


def flip_pushed_bytes(client: StoreClient) -> None:
    """From the next reserve or keep on. Idempotent."""
    if not isinstance(client._transport, FlippingTransport):
        client._transport = FlippingTransport(client._transport)
