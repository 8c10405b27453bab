"""JSON as replies have it; and long replies in parts, so that no part of one keeps the event loop.

value ─► to_json                       spliced(value, {field: parts}) ─► parts ─► PartsResponse ─► about PART_BYTES at a time
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PART_BYTES = 2**16


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def items(values: Sequence[Any]) -> bytes:
    """A list's JSON without its brackets."""
    return to_json(values)[1:-1].encode()


def listed(parts: Iterable[bytes]) -> list[bytes]:
    """A list's JSON from that of runs of its items; empty runs have none."""
    found = [b"["]
    for part in parts:
        if part:
            found += [part, b","]
    return [*(found[:-1] if len(found) > 1 else found), b"]"]


def spliced(value: Any, fields: Mapping[str, Sequence[bytes]]) -> list[bytes]:
    """JSON of value with the first null of each field replaced; fields: in the order in which they stand there.

    Quotation marks in texts are escaped, so none looks like a field.
    """
    parts, rest = list[bytes](), to_json(value).encode()
    for name, field in fields.items():
        head, null, rest = rest.partition(f'"{name}":null'.encode())
        assert null, f"the reply has no {name} to be replaced"
        parts += [head, f'"{name}":'.encode(), *field]
    return [*parts, rest]


class PartsResponse(Response):
    """Waits for the client between two parts, where it reads slowly."""

    media_type = "application/json"

    def __init__(self, parts: Sequence[bytes], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers=headers)
        self.headers["content-length"] = str(sum(map(len, parts)))
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in _joined(self._parts):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _joined(parts: Sequence[bytes]) -> Iterator[bytes]:
    waiting, num_bytes = list[bytes](), 0
    for part in parts:
        waiting.append(part)
        num_bytes += len(part)
        if num_bytes >= PART_BYTES:
            yield b"".join(waiting)
            waiting, num_bytes = [], 0
    yield b"".join(waiting)
