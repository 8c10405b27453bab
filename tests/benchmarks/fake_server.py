"""An OpenAI server without a model, whose tokens come when a script says so: what load generators are tested and measured against.

python tests/benchmarks/fake_server.py 8000 --ttft 0.2 --gap 0.02

It writes HTTP by hand on bare sockets: the time that a framework takes would be the measurement's error, and it can cut its bytes anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

REASONS = {200: "OK", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error"}


@dataclass(frozen=True)
class Script:
    """One answer. Moments are seconds after the request was read, one a chunk."""

    moments: Sequence[float] = ()
    tokens: Sequence[int] = ()  # in each chunk; empty: one
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: Any = None  # of another status
    cut: int = 0  # bytes are written in pieces of so many; 0: whole
    error_at: int | None = None  # after so many chunks an error event, and the end
    break_at: int | None = None  # after so many chunks the connection breaks
    hang_at: int | None = None  # after so many chunks nothing comes any more
    usage: bool = True
    num_cached: int = 0
    extension: dict[str, Any] | None = None  # "halfmoon" of the last chunk


@dataclass
class Seen:
    """One request as the server saw it; moments of time.perf_counter()."""

    body: dict[str, Any]
    headers: dict[str, str]
    read: float
    written: list[float] = field(default_factory=list[float])
    left: bool = False  # its client closed the connection before the end


Answer = Callable[[dict[str, Any]], Script]


class FakeServer:
    """
    Args:
        answer: a request's body -> its script.
    """

    def __init__(self, answer: Answer, max_model_len: int | None = None) -> None:
        self.answer = answer
        self.seen: list[Seen] = []
        self.url = ""
        self._max_model_len = max_model_len
        self._server: asyncio.Server | None = None
        self._streams: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FakeServer:
        return await self.start(0)

    async def start(self, port: int) -> FakeServer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, limit=2**24)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._streams:
            task.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._streams.discard(task)
            with contextlib.suppress(ConnectionError):
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
            method, path, _ = head[0].split()
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if method == "GET":
                card = {"id": "fake", "object": "model", "owned_by": "fake", "max_model_len": self._max_model_len}
                known = path == "/v1/models"
                writer.write(_whole(200 if known else 404, {"data": [card]} if known else {"error": {"message": "unknown"}}))
                await writer.drain()
                continue
            seen = Seen(json.loads(body), headers, time.perf_counter())
            self.seen.append(seen)
            script = self.answer(seen.body)
            if script.status != 200:
                writer.write(_whole(script.status, script.body, script.headers))
                await writer.drain()
            elif not await self._stream(script, seen, reader, writer, chat="messages" in seen.body):
                return

    async def _stream(
        self, script: Script, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, chat: bool
    ) -> bool:  # fmt: skip
        """False where the connection is over."""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        tokens = script.tokens or [1] * len(script.moments)
        for number, (moment, num_tokens) in enumerate(zip(script.moments, tokens, strict=True)):
            if number in (script.error_at, script.break_at, script.hang_at):
                break
            await asyncio.sleep(max(0.0, seen.read + moment - time.perf_counter()))
            if reader.at_eof() or writer.is_closing():
                seen.left = True
                return False
            seen.written.append(await _write(writer, _event(_chunk(" a" * num_tokens, None, chat)), script.cut))
        if script.hang_at is not None:
            try:
                seen.left = not await reader.read(1)
            except ConnectionError:
                seen.left = True
            return False
        if script.break_at is not None:
            return False
        if script.error_at is not None:
            await _write(writer, _event({"error": {"message": "the engine fell over", "code": "internal_error"}}), script.cut)
        else:
            last = _chunk("", "length", chat) | ({"halfmoon": script.extension} if script.extension else {})
            await _write(writer, _event(last), script.cut)
            if script.usage:
                num_prompt = len(seen.body.get("prompt", ()))
                details = {"cached_tokens": script.num_cached}
                usage = {"prompt_tokens": num_prompt, "completion_tokens": sum(tokens), "prompt_tokens_details": details}
                await _write(writer, _event(_chunk("", None, chat) | {"choices": [], "usage": usage}), script.cut)
            await _write(writer, b"data: [DONE]\n\n", script.cut)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def steady(ttft_s: float, gap_s: float) -> Answer:
    """One token a chunk, max_tokens of them."""
    return lambda body: Script([ttft_s + gap_s * number for number in range(body["max_tokens"])])


def _chunk(text: str, reason: str | None, chat: bool) -> dict[str, Any]:
    shape = {"delta": {"content": text} if text else {}} if chat else {"text": text}
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": "cmpl-1", "object": kind, "created": 1, "model": "fake", "choices": [{"index": 0, **shape, "finish_reason": reason}]}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def _write(writer: asyncio.StreamWriter, data: bytes, cut: int) -> float:
    """The moment of its last byte. Cut pieces are read one by one by the client: a turn of the loop lies between them."""
    moment = 0.0
    for piece in _pieces(data, cut):
        moment = time.perf_counter()
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if cut:
            await writer.drain()
            await asyncio.sleep(0.0005)
    return moment


def _pieces(data: bytes, cut: int) -> list[bytes]:
    return [data[start : start + cut] for start in range(0, len(data), cut)] if cut else [data]


def _whole(status: int, body: Any, headers: dict[str, str] | None = None) -> bytes:
    data = json.dumps(body).encode()
    lines = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} {REASONS[status]}\r\n{head}\r\n".encode() + data


async def serve(port: int, ttft_s: float, gap_s: float) -> None:
    async with await FakeServer(steady(ttft_s, gap_s)).start(port) as server:
        sys.stdout.write(server.url + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("port", type=int, help="0: any free one; the address is printed")
    options.add_argument("--ttft", type=float, default=0.2)
    options.add_argument("--gap", type=float, default=0.02)
    arguments = options.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments.port, arguments.ttft, arguments.gap))
