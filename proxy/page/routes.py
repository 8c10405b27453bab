"""GET /: the cluster as a page for people. Plain files of the package, and one JSON that they read each second.

GET /  · /page/{file} ─► files, read once, the same for everybody
GET /page/state       ─► the view as JSON, made at most each REFRESH_S, whoever asks how often; with a key where the cluster has keys
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from ...protocol.version import package_version
from ..requests.generation import Generator
from .view import view

REFRESH_S = 0.5
STATIC = Path(__file__).parent / "static"
TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = ("charts.js", "icon.svg", "page.css", "page.js", "parts.js", "prompt.js")
SAFE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def add_page(app: FastAPI, generator: Generator, *, shows_requests: bool) -> None:
    """shows_requests: False where one client's requests are not another's to see."""
    state = _State(generator, shows_requests)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return index

    def add_file(name: str) -> None:
        found = _file(name)

        @app.get(f"/page/{name}", include_in_schema=False)
        async def file() -> Response:
            return found

    @app.get("/page/state", include_in_schema=False)
    async def page_state() -> Response:
        return Response(state.content(), headers=SAFE | {"cache-control": "no-store"}, media_type="application/json")

    index = _file("index.html")
    for name in FILES:
        add_file(name)


def _file(name: str) -> Response:
    content = (STATIC / name).read_bytes()
    return Response(content, headers=SAFE | {"cache-control": "no-cache"}, media_type=TYPES[name.rpartition(".")[2]])


class _State:
    def __init__(self, generator: Generator, shows_requests: bool) -> None:
        self._generator = generator
        self._shows_requests = shows_requests
        self._started = time.monotonic()
        self._made = -REFRESH_S
        self._content = b""

    def content(self) -> bytes:
        now = time.monotonic()
        if not self._content or now - self._made >= REFRESH_S:
            self._content = json.dumps(self._now(now), separators=(",", ":"), allow_nan=False).encode()
            self._made = now
        return self._content

    def _now(self, now: float) -> dict[str, Any]:
        generator = self._generator
        card = {
            "version": package_version(),
            "model": generator.card.name,
            "max_model_len": generator.max_model_len,
            "takes_chats": generator.takes_chats,
            "up_s": round(now - self._started, 1),
        }
        return card | view(generator.router) | ({} if self._shows_requests else {"under_way": [], "ended": []})
