"""The store's data connections: a thread each, so that no KV byte passes through the event loop that serves control.

accept ─► TLS? ─► HELLO: whose session? ─► request ─► slots entered ─► bytes between socket and arena ─► slots left ─► reply
A session's end shuts its connections down; a lease that ends breaks off the copies that are under way in its slots.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Sequence

from ..protocol.credentials import SocketTls
from ..protocol.errors import HalfmoonError, InvalidRequest
from .arena import ArenaMap
from .data_wire import (
    HELLO,
    MAGIC,
    MAX_MESSAGE_BYTES,
    PIECE_BYTES,
    REPLY,
    REQUEST_BYTES,
    TOKEN_BYTES,
    Ended,
    Op,
    Request,
    Status,
    break_off,
    receive,
    receive_into,
    send_views,
)
from .slot_access import OpenLease, SlotAccess

logger = logging.getLogger(__name__)

MAX_CONNECTIONS_A_SESSION = 16
HELLO_TIMEOUT_S = 5.0  # a stranger that connects and says nothing holds a thread no longer


class DataServer:
    """start, open_session, end_session, stop: the event loop."""

    def __init__(self, access: SlotAccess, arena: Callable[[], ArenaMap], moved: Callable[[Request, int], None]) -> None:
        """arena: called once a session is open. moved(request, bytes): a slice was copied; called on a connection's thread, before its
        reply is sent."""
        self._access = access
        self._arena = arena
        self._moved = moved
        self._lock = threading.Lock()  # guards the two below
        self._sessions: dict[bytes, str] = {}  # by data token
        self._connections: dict[_Connection, str] = {}
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self.port = 0

    def start(self, host: str, tls: SocketTls | None = None) -> None:
        """Listens on a free port of host. tls: of a server; None: in the clear. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.port = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, args=(self._listener, tls), name="store-data", daemon=True)
        self._accepting.start()

    def open_session(self, session_id: str) -> bytes:
        """The token that its data connections begin with."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._sessions[token] = session_id
        return token

    def end_session(self, session_id: str) -> None:
        with self._lock:
            self._sessions = {token: found for token, found in self._sessions.items() if found != session_id}
            ending = [connection for connection, found in self._connections.items() if found == session_id]
        for connection in ending:
            connection.shut_down()

    def stop(self) -> None:
        """Ends every connection; returns when none touches the arena any more. Not on the event loop."""
        if self._listener is None or self._accepting is None:
            return
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._accepting.join()
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.shut_down()
        for connection in connections:
            connection.thread.join()

    # for connections' threads

    def admit(self, connection: _Connection, token: bytes) -> str:
        """The session that the connection is of. Raises InvalidRequest."""
        with self._lock:
            session_id = next((found for known, found in self._sessions.items() if hmac.compare_digest(known, token)), None)
            if session_id is None:
                raise InvalidRequest("the data token is of no session")
            if sum(found == session_id for found in self._connections.values()) >= MAX_CONNECTIONS_A_SESSION:
                raise InvalidRequest(f"the session has {MAX_CONNECTIONS_A_SESSION} data connections already")
            self._connections[connection] = session_id
            return session_id

    def gone(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.pop(connection, None)

    def copy(self, connection: _Connection, session_id: str, request: Request) -> None:
        """Raises HalfmoonError before the first byte of a refused request, OSError where the connection broke."""
        lease = self._access.enter(session_id, request, connection, connection.shut_down)
        if lease is None:
            self.skip(connection, request)
            connection.reply(Status.OK)
            return
        done = False
        try:
            views = self._views(lease, request)
            if request.op is Op.READ:
                connection.reply(Status.OK)
                send_views(connection.socket, views)
            else:
                receive_into(connection.socket, views)
            self._moved(request, sum(map(len, views)))
            done = True
        finally:
            self._access.leave(lease, connection, request, done=done)
        if request.op is Op.WRITE:
            connection.reply(Status.OK)

    def skip(self, connection: _Connection, request: Request) -> None:
        """Reads the bytes of a write that are not wanted. Raises ConnectionError for more than an arena holds."""
        arena = self._arena()
        left = request.num_blocks * request.num_layers * arena.memory.shape[1]
        if request.op is Op.READ:
            return
        if left > arena.memory.size:
            raise ConnectionError("it announces more bytes than the arena has")
        scratch = memoryview(bytearray(min(left, PIECE_BYTES)))
        while left:
            receive_into(connection.socket, [scratch[:left]])
            left -= min(left, len(scratch))

    def _views(self, lease: OpenLease, request: Request) -> Sequence[memoryview]:
        slots = lease.slots[request.first_block : request.first_block + request.num_blocks]
        rows = self._arena().rows(slots, request.layer, request.num_layers)
        views: list[memoryview] = []
        for run in rows.runs:  # whole slots that follow each other are one piece
            views.extend([run.reshape(-1).data] if run.flags.c_contiguous else [row.data for row in run])
        return views

    def _accept(self, listener: socket.socket, tls: SocketTls | None) -> None:
        while True:
            try:
                accepted, peer = listener.accept()
            except OSError:
                return  # stop() has shut it down
            try:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if tls is not None:
                    accepted = tls.context().wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
            except OSError as error:
                logger.info("a connection of %s broke: %s", peer, error)
                accepted.close()
                continue
            _Connection(self, accepted, str(peer)).thread.start()


class _Connection:
    def __init__(self, server: DataServer, accepted: socket.socket, peer: str) -> None:
        self.socket = accepted
        self.thread = threading.Thread(target=self._run, name=f"store-data-{peer}", daemon=True)
        self._server = server

    def shut_down(self) -> None:
        """From any thread: what its own thread waits for fails at once."""
        break_off(self.socket)

    def reply(self, status: Status, message: str = "") -> None:
        text = message.encode()[:MAX_MESSAGE_BYTES]
        self.socket.sendall(REPLY.pack(status, len(text)) + text)

    def _run(self) -> None:
        try:
            self._serve()
        except Ended:
            logger.debug("%s closed", self.thread.name)
        except (OSError, ValueError) as error:
            logger.info("%s broke: %s", self.thread.name, error)
            break_off(self.socket)
        finally:
            self._server.gone(self)
            self.socket.close()

    def _serve(self) -> None:
        self.socket.settimeout(HELLO_TIMEOUT_S)
        if isinstance(self.socket, ssl.SSLSocket):
            self.socket.do_handshake()
        magic, token = HELLO.unpack(receive(self.socket, HELLO.size))
        self.socket.settimeout(None)
        if magic != MAGIC:
            raise ValueError("what connected speaks another protocol")
        try:
            session_id = self._server.admit(self, token)
        except InvalidRequest as error:
            self.reply(Status.INVALID, error.message)
            return
        self.reply(Status.OK)
        while True:
            request = Request.unpack(receive(self.socket, REQUEST_BYTES))
            try:
                self._server.copy(self, session_id, request)
            except HalfmoonError as error:
                self._server.skip(self, request)
                self.reply(Status.INVALID if isinstance(error, InvalidRequest) else Status.GONE, error.message)
