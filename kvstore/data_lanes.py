"""A client's data connections to one store: opened when they are needed, kept, each in one caller's hands at a time.

take ─► connected lane ─► request, bytes ─► back            broken: closed, and the next one is opened anew
Calls block: they are for threads.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..protocol.credentials import SocketTls
from ..protocol.errors import HalfmoonError, InvalidRequest, LeaseExpired, StoreUnavailable
from ..protocol.tls import MEMBER_NAME
from .data_wire import HELLO, MAGIC, MAX_MESSAGE_BYTES, REPLY, Status, break_off, receive

MAX_LANES = 4
CONNECT_TIMEOUT_S = 5.0


class DataLanes:
    def __init__(self, peer: str, host: str, port: int, token: bytes, tls: SocketTls | None = None) -> None:
        """peer: the store, as errors name it. tls: of a client; None: in the clear."""
        self._peer = peer
        self._address = (host, port)
        self._token = token
        self._tls = tls
        self._changed = threading.Condition()  # guards the three below
        self._idle: list[socket.socket] = []
        self._open: set[socket.socket] = set()
        self._num_taken = 0
        self._is_closed = False

    @contextmanager
    def take(self) -> Iterator[socket.socket]:
        """A connected socket; closed where the caller raises OSError. Raises StoreUnavailable once the lanes are closed, OSError where
        none can be opened."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._num_taken < MAX_LANES)
            self._require_open()
            self._num_taken += 1
            lane = self._idle.pop() if self._idle else None
        try:
            lane = lane or self._connect()
            yield lane
        except HalfmoonError:
            self._give_back(lane)  # the store refused, and both sides stand at the end of a message
            raise
        except BaseException:
            self._discard(lane)
            raise
        self._give_back(lane)

    def close(self) -> None:
        """Calls under way raise StoreUnavailable. From any thread; idempotent."""
        with self._changed:
            self._is_closed = True
            for lane in self._idle:
                lane.close()
                self._open.discard(lane)
            self._idle.clear()
            for lane in self._open:  # its user closes it
                break_off(lane)
            self._changed.notify_all()

    def unavailable(self, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(f"the data connection to {self._peer} broke ({error}); the store died, or a link is down")

    def _require_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable(f"the session at {self._peer} is over, and its data connections with it")

    def _connect(self) -> socket.socket:
        lane = socket.create_connection(self._address, CONNECT_TIMEOUT_S)
        if self._tls is not None:
            lane = self._tls.context().wrap_socket(lane, server_hostname=MEMBER_NAME, do_handshake_on_connect=False)
        with self._changed:
            self._open.add(lane)
        try:
            self._require_open()
            if isinstance(lane, ssl.SSLSocket):
                lane.do_handshake()
            lane.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lane.sendall(HELLO.pack(MAGIC, self._token))
            read_reply(lane)
            lane.settimeout(None)  # the session's heartbeats tell whether the store lives
        except InvalidRequest as error:
            self._discard(lane, was_taken=False)
            raise OSError(error.message) from error
        except BaseException:
            self._discard(lane, was_taken=False)
            raise
        return lane

    def _give_back(self, lane: socket.socket | None) -> None:
        with self._changed:
            self._num_taken -= 1
            if lane is not None and self._is_closed:
                lane.close()
                self._open.discard(lane)
            elif lane is not None:
                self._idle.append(lane)
            self._changed.notify()

    def _discard(self, lane: socket.socket | None, *, was_taken: bool = True) -> None:
        with self._changed:
            self._num_taken -= was_taken
            if lane is not None:
                break_off(lane)
                lane.close()
                self._open.discard(lane)
            self._changed.notify()


def read_reply(lane: socket.socket) -> None:
    """Raises InvalidRequest, LeaseExpired as the store says, OSError where the connection broke."""
    status, message_bytes = REPLY.unpack(receive(lane, REPLY.size))
    if message_bytes > MAX_MESSAGE_BYTES:
        raise ConnectionError("the reply is none")
    message = receive(lane, message_bytes).decode(errors="replace") if message_bytes else ""
    if status == Status.GONE:
        raise LeaseExpired(message)
    if status != Status.OK:
        raise InvalidRequest(message)
