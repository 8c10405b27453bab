"""One HTTP connection, on which a client can't leave anything undone for ever. It is uvicorn's own, with limits.

open ─► head: head_timeout_s, max_head_bytes ─► uvicorn's cycle: body, app, reply ─► idle: idle_timeout_s ─► head …
  └─ max_connections: 429                                        └─ the client takes nothing for write_timeout_s: aborted
"""

from __future__ import annotations

import asyncio
import logging
import math
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from ...protocol.config import ProxyConfig
from ...protocol.errors import HalfmoonError, HeadTooLarge, InvalidRequest, Overloaded, RequestTimeout
from ..face_metrics import FaceMetrics
from .encoded import to_json
from .errors import error_body

MIN_TAKEN_BYTES = 2**14
"""What a client must take of a full buffer in write_timeout_s: half a kilobyte a second by default."""

logger = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    def __init__(
        self,
        limits: ProxyConfig,
        faces: FaceMetrics,
        *,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.timeout_keep_alive = limits.idle_timeout_s  # pyright: ignore[reportAttributeAccessIssue] - uvicorn takes whole seconds
        self._limits = limits
        self._faces = faces
        self._refusal: HalfmoonError | None = None  # raised in one of the parser's callbacks
        self._in_head = False
        self._head_bytes = 0  # of what the parser has told
        self._raw_head_bytes = 0  # of what came since the head began, told or not
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - as uvicorn's
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(Overloaded(f"{self._limits.max_connections} connections are open, which is the limit; come back later"))
        else:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    # The head

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._raw_head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._raw_head_bytes > self._limits.max_head_bytes:
            self._refuse(self._head_too_large())
        elif not self._is_answering and self._head_timer is None and self.timeout_keep_alive_task is None:
            self._start_head_timer()  # of bytes behind a reply, which end its idle time and begin no head

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._raw_head_bytes = 0
        if not self._is_answering:
            self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where the parser gives up."""
        if self._is_answering:
            self._close()  # the reply that has begun is cut off; no other may stand in it
        else:
            self._refuse(self._refusal or InvalidRequest("what was sent is no HTTP/1.1 request"))

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._limits.max_head_bytes:
            self._refusal = self._head_too_large()
            raise self._refusal  # the parser stops at it

    def _head_too_large(self) -> HeadTooLarge:
        return HeadTooLarge(f"the head of the request has more than {self._limits.max_head_bytes} bytes; send fewer or shorter headers")

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self._limits.head_timeout_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self._in_head:
            self._refuse(RequestTimeout(f"the head of the request did not end within {self._limits.head_timeout_s:g} s"))
        else:
            self._close()

    # What is written

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_write_timer()

    def _watch_reader(self) -> None:
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._reader_is_late, self.transport.get_write_buffer_size())

    def _reader_is_late(self, num_bytes_before: int) -> None:
        if num_bytes_before - self.transport.get_write_buffer_size() >= MIN_TAKEN_BYTES:
            self._watch_reader()
            return
        logger.info("a client took nothing of its reply for %g s; its connection is closed", self._limits.write_timeout_s)
        self._faces.refused("http", RequestTimeout("").code)
        self.transport.abort()  # the app is told of a client that left, and cancels its request

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # The end

    def _refuse(self, error: HalfmoonError) -> None:
        """Answers and closes. Counts like a request, though the app never sees one."""
        self._faces.refused("http", error.code)
        self._faces.http_request("other", "other", error.http_status)
        body = to_json(error_body(error, "")).encode()
        lines = [
            f"HTTP/1.1 {error.http_status} {HTTPStatus(error.http_status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        if isinstance(error, Overloaded):
            lines.append(f"retry-after: {math.ceil(error.retry_after_s)}")
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._close()

    def _close(self) -> None:
        """After what is still to be written, for which there is a limit, too."""
        self.transport.close()
        self._abort_later()

    def _abort_later(self) -> None:
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)
