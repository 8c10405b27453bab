"""HEAD on every route that takes GET. FastAPI routes the methods that they name; uvicorn leaves out the body of the reply."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


def head_as_get(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await app(scope, receive, send)
        inner = {**scope, "method": "GET"}
        try:
            await app(inner, receive, send)
        finally:
            if "route" in inner:  # for who counts the request
                scope["route"] = inner["route"]

    return answer
