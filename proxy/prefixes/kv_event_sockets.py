"""Publishes KV events over ZeroMQ as vLLM does: a PUB socket, and a ROUTER socket that sends batches again.

index, prompts ─► queue ─► BlockEvents ─► [time, [event, …], rank] in msgpack ─► PUB: topic, sequence number, batch
                                                  └─► the last BUFFER_BATCHES ◄── ROUTER: from this number on, then the number -1
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

from ...protocol.blocks import block_keys
from ...protocol.errors import ConfigError
from ...protocol.schema import KVSchema
from ...protocol.tasks import Tasks
from .index import PrefixIndex
from .kv_events import CLEARED, BlockEvents, Event

logger = logging.getLogger(__name__)

BUFFER_BATCHES = 10_000  # that can be asked for again; of 256 blocks and 64 tokens at most, some 60 KB each
HIGH_WATER_MARK = 100_000  # batches that wait for one slow subscriber; it loses what comes then
END = (-1).to_bytes(8, "big", signed=True)
RANK = 0  # of data parallelism: a cluster is one


class KvEventSockets:
    """On the event loop. Until start() nothing is open; what is told before waits."""

    def __init__(self, index: PrefixIndex, endpoint: str, replay_endpoint: str = "", topic: str = "") -> None:
        """Raises ConfigError where pyzmq or msgpack is missing."""
        try:
            msgpack, zmq, sockets = map(import_module, ("msgpack", "zmq", "zmq.asyncio"))
        except ImportError as error:
            raise ConfigError(
                "proxy.kv_events_endpoint needs pyzmq and msgpack: pip install 'halfmoon[kv-events]'", key="proxy.kv_events_endpoint"
            ) from error
        self._zmq: Any = zmq  # untyped, as msgpack is
        self._pack: Any = msgpack.packb
        self._index = index
        self._endpoint, self._replay_endpoint, self._topic = endpoint, replay_endpoint, topic.encode()
        self._context: Any = sockets.Context()
        self._events: BlockEvents | None = None  # None before the first prompt
        self._schema: KVSchema | None = None
        self._news: asyncio.Queue[Iterator[Event]] = asyncio.Queue()
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=BUFFER_BATCHES)
        self._sequence = 0
        self._tasks = Tasks("KV events")
        index.on_change = self._changed

    def start(self) -> None:
        """Raises ConfigError where an endpoint can't be bound."""
        publisher = self._bind(self._zmq.PUB, self._endpoint, "kv_events_endpoint")
        self._tasks.spawn(self._publish(publisher), "publishing KV events")
        if self._replay_endpoint:
            replay = self._bind(self._zmq.ROUTER, self._replay_endpoint, "kv_events_replay_endpoint")
            self._tasks.spawn(self._replay(replay), "sending KV events again")

    async def close(self) -> None:
        self._index.on_change = None
        await self._tasks.close()
        self._context.destroy(linger=0)

    def know(self, schema: KVSchema, keys: Sequence[bytes], token_ids: Sequence[int]) -> None:
        """A prompt, with as much of its answer as there is. keys: of its first full blocks, those of the prompt at least."""
        if self._schema != schema:  # another model's blocks are others
            self._news.put_nowait(iter([CLEARED]))
            self._schema, self._events = schema, BlockEvents(schema.block_size, self._index.is_held)
        assert self._events is not None
        num_known = len(keys) * schema.block_size
        new = block_keys(keys[-1], token_ids[num_known:], schema.block_size) if keys else []
        self._news.put_nowait(self._events.know([*keys, *new], token_ids))

    def _changed(self, new: Sequence[bytes], gone: Sequence[bytes]) -> None:
        if self._events is not None:
            self._news.put_nowait(self._events.changed(new, gone))

    def _bind(self, kind: int, endpoint: str, key: str) -> Any:
        socket = self._context.socket(kind)
        socket.set_hwm(HIGH_WATER_MARK)
        try:
            socket.bind(endpoint)
        except self._zmq.ZMQError as error:
            raise ConfigError(f"proxy.{key} is {endpoint}, which can't be bound: {error}; give another one", key=f"proxy.{key}") from error
        logger.info("KV events at %s", socket.last_endpoint.decode())
        return socket

    async def _publish(self, publisher: Any) -> None:
        while True:
            for event in await self._news.get():
                await self._send(publisher, [event])
                await asyncio.sleep(0)  # serves others

    async def _send(self, publisher: Any, events: Iterable[Event]) -> None:
        payload: bytes = self._pack([time.time(), events, RANK])
        number = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        self._buffer.append((number, payload))
        await publisher.send_multipart((self._topic, number, payload))

    async def _replay(self, socket: Any) -> None:
        while True:
            client, *rest = await socket.recv_multipart()
            if len(rest) != 2 or len(rest[1]) != len(END):
                logger.warning("a request for KV events that is not an empty frame and a number of 8 bytes is left")
                continue
            for number, payload in [batch for batch in self._buffer if batch[0] >= rest[1]]:
                await socket.send_multipart((client, b"", number, payload))
            await socket.send_multipart((client, b"", END, b""))
