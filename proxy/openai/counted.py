"""Counts every HTTP request by its route and status, whatever answered it."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..face_metrics import FaceMetrics

METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
NO_STATUS = 499  # the client left before there was one


def counted(app: ASGIApp, faces: FaceMetrics) -> ASGIApp:
    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        status = NO_STATUS

        def noting(message: Message) -> Awaitable[None]:  # no coroutine of its own: it is called for every token
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await app(scope, receive, noting)
        finally:
            route = scope.get("route")  # of the app's own; a path that is none could be anything
            method = scope["method"] if scope["method"] in METHODS else "other"
            faces.http_request(method, getattr(route, "path", "other"), status)

    return count
