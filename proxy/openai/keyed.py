"""Lets requests in that bring an API key, where the configuration names a file of them. All but GUARDED is open: /health, /ready, files."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ...protocol.errors import Unauthenticated
from ..face_metrics import FaceMetrics
from ..tenants.gate import Gate
from .errors import error_response

GUARDED = ("/v1", "/page/state", "/tokenize", "/detokenize")


def keyed(app: ASGIApp, gate: Gate | None, faces: FaceMetrics) -> ASGIApp:
    """The app itself without a gate. A request that is refused has nothing of its body read."""
    if gate is None:
        return app

    async def check(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(GUARDED):
            try:
                tenant = gate.tenant_of(_authorization(Headers(scope=scope)))
            except Unauthenticated as error:
                faces.refused("http", error.code)
                response = error_response(Request(scope), error)
                response.headers["www-authenticate"] = "Bearer"
                return await response(scope, receive, send)
            scope.setdefault("state", {})["tenant"] = tenant
        await app(scope, receive, send)

    return check


def _authorization(headers: Headers) -> str:
    """Anthropic's API takes keys as x-api-key, too."""
    key = headers.get("x-api-key", "")
    return headers.get("authorization") or (f"Bearer {key}" if key else "")
