"""Lets pages of other origins call the API from a browser (CORS), where the configuration names them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp


def for_browsers(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """The app itself where there are no origins: OPTIONS is then a method like any other that a route does not take."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),  # OpenAI's client sends a dozen of its own
        expose_headers=("x-request-id", "request-id", "retry-after", "retry-after-ms"),
    )
