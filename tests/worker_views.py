"""A worker as tests look at it: one of its halves, and what it stands on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfmoon.engine.worker import Worker
from halfmoon.kvstore.block_rows import BlockRows
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.transport import Piece, Transport, TransportName
from halfmoon.protocol.errors import StoreUnavailable
from halfmoon.protocol.v1 import control_pb2, kvstore_pb2


@dataclass
class WorkerView:
    worker: Worker
    half: Any  # PrefillHalf | DecodeHalf

    @property
    def engine(self) -> Any:
        executor: Any = self.worker.executor
        return executor.engine

    @property
    def scheduler(self) -> Any:
        return self.half.scheduler

    @property
    def metrics(self) -> Any:
        return self.worker.metrics

    @property
    def life(self) -> Any:
        return self.worker.life

    @property
    def address(self) -> str:
        return self.worker.address

    @property
    def transfer(self) -> Any:
        """The thread that copies, whatever else is asked of the executor's pages."""
        executor: Any = self.worker.executor
        return executor.pages._transfer

    @property
    def is_attached(self) -> bool:
        """To its own store."""
        try:
            return not self.worker.stores.own.client.lost.is_set()
        except StoreUnavailable:
            return False

    def slow(self, seconds: float) -> list[float]:
        """Every step takes that much longer, so that something can happen meanwhile. Returns the steps that have begun, by time."""
        engine, steps = self.engine, []
        forward = engine.forward

        def slowed(*args: Any, **kwargs: Any) -> Any:
            steps.append(time.monotonic())
            time.sleep(seconds)
            return forward(*args, **kwargs)

        engine.forward = slowed
        return steps

    def load(self) -> control_pb2.MemberLoad:
        return self.worker.load()

    async def serve_until_stopped(self) -> None:
        await self.worker.serve_until_stopped()

    async def stop(self, grace_s: float) -> None:
        await self.worker.stop(grace_s)


class FlippingTransport:
    """Passes everything on, with the first byte of every slice inverted after its checksum was taken."""

    memory: np.ndarray | None = None  # so that every slice comes as an array

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    @property
    def name(self) -> TransportName:
        return self._inner.name

    @property
    def threads(self) -> Executor | None:
        return self._inner.threads

    def push(self, lease_id: str, slots: Sequence[int], layer: int, first_block: int, blocks: np.ndarray) -> Iterator[Piece]:
        altered = blocks.copy()
        altered[0, 0] ^= 0xFF
        return self._inner.push(lease_id, slots, layer, first_block, altered)

    def rows(self, slots: Sequence[int], layer: int, num_layers: int = 1) -> BlockRows:
        return self._inner.rows(slots, layer, num_layers)

    def fetch(self, lease_id: str, slots: Sequence[int], part: kvstore_pb2.FetchReply.Slice) -> BlockRows:
        return self._inner.fetch(lease_id, slots, part)

    def close(self) -> None:
        self._inner.close()


def flip_pushed_bytes(client: StoreClient) -> None:
    """Of a session, from the next reserve or cache on."""
    client._transport = FlippingTransport(client._transport)
