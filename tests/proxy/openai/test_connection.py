"""proxy/openai/connection.py: what a client leaves undone ends, by real sockets to a face with short limits."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LIMITS = {"head_timeout_s": 0.3, "body_timeout_s": 0.3, "idle_timeout_s": 0.3, "write_timeout_s": 0.3, "max_head_bytes": 4096}


@pytest.fixture(scope="module")
def strict(make_face: Callable[..., Any]) -> Any:
    """A face with limits of a third of a second."""
    return make_face(**LIMITS)


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What a client does or leaves undone is no error of the proxy's."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelname != "INFO"] == []


@contextlib.contextmanager
def connected(face: Any, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    """receive_bytes: of the receive buffer; None: the system's."""
    host, port = face.http.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(60)  # where nothing ends it
        connection.connect((host, int(port)))
        yield connection


def rest(connection: socket.socket) -> bytes:
    """Everything until the proxy closes."""
    parts: list[bytes] = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def status_and_error(reply: bytes) -> tuple[int, Any]:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head and b"connection: close" in head
    return int(head.split(b" ")[1]), json.loads(body)["error"]


def post(content: bytes) -> bytes:
    return HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert holds()


def test_a_connection_without_a_request_is_closed(strict: Any) -> None:
    with connected(strict) as connection:
        assert rest(connection) == b""


@pytest.mark.parametrize("sent", [b"P", HEAD, HEAD + b"X: "])
def test_a_head_that_does_not_end_is_a_408(sent: bytes, strict: Any) -> None:
    with connected(strict) as connection:
        connection.sendall(sent)
        status, error = status_and_error(rest(connection))
    assert status == 408 and error["code"] == "request_timeout" and "head" in error["message"]


def test_a_head_that_comes_byte_by_byte_gets_no_more_time(strict: Any) -> None:
    with connected(strict) as connection:
        connection.settimeout(0.02)
        for num_bytes in range(3000):  # a minute
            with contextlib.suppress(TimeoutError):
                connection.sendall(b"P" if num_bytes == 0 else b"OST /health HTTP/1.1\r\nX: "[num_bytes - 1 : num_bytes] or b"x")
                assert connection.recv(65536).startswith(b"HTTP/1.1 408")
                return
    pytest.fail("the connection was never closed")


@pytest.mark.parametrize("first", [b"", b"{"])
@pytest.mark.parametrize("framing", [b"Content-Length: 100\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n9\r\n"])
def test_a_body_that_does_not_end_is_a_408(first: bytes, framing: bytes, strict: Any) -> None:
    with connected(strict) as connection:
        connection.sendall(HEAD + framing + first)
        status, error = status_and_error(rest(connection))
    assert status == 408 and f"({len(first)} bytes came)" in error["message"]


def test_an_idle_connection_is_closed_after_its_reply(strict: Any) -> None:
    with connected(strict) as connection:
        connection.sendall(GET * 2)
        reply = connection.recv(65536)
        assert {one.timeout_keep_alive for one in connections(strict)} == {0.3}  # uvicorn's own would end it, too, after 5 s
        assert (reply + rest(connection)).count(b"HTTP/1.1 200") == 2


def test_bytes_that_begin_no_request_do_not_keep_a_connection(strict: Any) -> None:
    with connected(strict) as connection:
        connection.sendall(GET)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        assert rest(connection) == b""


def test_a_stream_outlives_every_limit_while_no_token_comes(strict: Any) -> None:
    strict.reset()
    strict.workers.gate_at = 3
    with httpx.stream("POST", f"{strict.http}/v1/completions", json={"prompt": "x", "stream": True}, timeout=60) as reply:
        parts = reply.iter_text()
        begun = next(parts)
        until_s = time.monotonic() + 4 * max(value for name, value in LIMITS.items() if name.endswith("_s"))
        until(lambda: time.monotonic() > until_s)
        strict.open_gate()
        assert (begun + "".join(parts)).endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: x\r\n" % index for index in range(2000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 1_000_000,  # without an end
    ],
)
def test_a_head_that_is_too_large_is_a_431(sent: bytes, strict: Any) -> None:
    with connected(strict) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        reply = rest(connection)
    if reply:  # the proxy may close while bytes are on their way, which tells a client nothing
        status, error = status_and_error(reply)
        assert status == 431 and "more than 4096 bytes" in error["message"]
    assert httpx.get(f"{strict.http}/health").status_code == 200


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01 a TLS hello", b"GET\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_is_a_400(sent: bytes, strict: Any) -> None:
    with connected(strict) as connection:
        connection.sendall(sent)
        status, error = status_and_error(rest(connection))
    assert status == 400 and error["code"] == "invalid_request"


def test_one_connection_too_many_is_a_429_and_room_comes_back(make_face: Callable[..., Any]) -> None:
    face = make_face(max_connections=2)
    with connected(face), connected(face) as second:
        second.sendall(GET)
        assert second.recv(65536).startswith(b"HTTP/1.1 200")
        with connected(face) as third:
            reply = rest(third)
        status, error = status_and_error(reply)
        assert status == 429 and b"retry-after: 1" in reply and "2 connections are open" in error["message"]
    until(lambda: httpx.get(f"{face.http}/health").status_code == 200)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_loses_its_request(stream: bool, strict: Any) -> None:
    """KV is freed, and nothing of the reply is kept."""
    strict.reset()
    strict.workers.script = lambda sequence: [5] * 400
    strict.workers.gate_at = 399 if stream else None
    body = {"prompt": [5] * 8, "max_tokens": 400, "stream": stream, "logprobs": 20}
    with connected(strict, receive_bytes=4096) as connection:
        connection.sendall(post(json.dumps(body).encode()))
        if stream:
            assert strict.workers.cancelled.wait(60)
        until(lambda: strict.num_under_way == 0 and not any(not one.transport.is_closing() for one in connections(strict)))
        assert not rest(connection).endswith(b"[DONE]\n\n")


def connections(face: Any) -> Any:
    return list(face.server._http.server_state.connections)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("moment", ["head", "body", "prefill", "stream", "reply"])
def test_a_client_may_leave_at_any_moment(moment: str, reset: bool, face: Any) -> None:
    streams = moment == "stream"
    face.workers.gate_at = {"prefill": 0, "reply": 3, "stream": 3}.get(moment)
    content = json.dumps({"prompt": "x", "stream": streams}).encode()
    with connected(face) as connection:
        connection.sendall({"head": HEAD, "body": post(content)[:-3]}.get(moment, post(content)))
        if moment not in ("head", "body"):
            assert face.workers.arrived.wait(60)
        if streams:
            assert connection.recv(1) == b"H"
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if moment not in ("head", "body"):
        assert face.workers.cancelled.wait(60)
    until(lambda: face.num_under_way == 0)
    assert httpx.get(f"{face.http}/health").status_code == 200
