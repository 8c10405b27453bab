"""proxy/openai/browsers.py and head.py: pages of other origins, and HEAD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from halfmoon.protocol.config import ProxyConfig
from halfmoon.protocol.errors import ConfigError

PAGE = "https://chat.example.org"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


@pytest.fixture(scope="module")
def open_face(make_face: Callable[..., Any]) -> Any:
    return make_face(cors_origins=f"{PAGE} http://localhost:3000")


def test_a_page_of_a_named_origin_may_ask_and_read_the_answer(open_face: Any) -> None:
    preflight = httpx.options(f"{open_face.http}/v1/completions", headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    reply = httpx.post(f"{open_face.http}/v1/completions", json={"prompt": "x", "stream": True}, headers={"origin": PAGE}, timeout=60)
    assert reply.text.endswith("data: [DONE]\n\n") and reply.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in reply.headers["access-control-expose-headers"].lower()
    refused = httpx.post(f"{open_face.http}/v1/completions", json={"prompt": 3}, headers={"origin": PAGE}, timeout=60)
    assert refused.status_code == 400 and refused.headers["access-control-allow-origin"] == PAGE  # or the page could not read why


def test_a_page_of_another_origin_may_not(open_face: Any) -> None:
    other = {"origin": "https://evil.example.org"}
    assert "access-control-allow-origin" not in httpx.options(f"{open_face.http}/v1/completions", headers=PREFLIGHT | other).headers
    assert "access-control-allow-origin" not in httpx.get(f"{open_face.http}/v1/models", headers=other).headers


def test_without_origins_there_is_no_cors(face: Any) -> None:
    preflight = httpx.options(f"{face.http}/v1/completions", headers=PREFLIGHT)
    assert preflight.status_code == 405 and preflight.headers["allow"] == "POST"
    assert not [name for name in preflight.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", ["chat.example.org", "https://chat.example.org/page", "* ftp://x"])
def test_what_is_no_origin_is_a_config_error(origins: str) -> None:
    with pytest.raises(ConfigError, match=r"proxy\.cors_origins has .* an origin is a scheme and a host"):
        ProxyConfig(cors_origins=origins)


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/chatty", "/openapi.json"])
def test_head_is_get_without_a_body(path: str, face: Any) -> None:
    head, get = httpx.head(f"{face.http}{path}"), httpx.get(f"{face.http}{path}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert httpx.get(f"{face.http}/health").status_code == 200


def test_head_on_a_route_without_get_is_a_405_and_counted_as_head(face: Any) -> None:
    assert httpx.head(f"{face.http}/v1/completions").status_code == 405
    httpx.head(f"{face.http}/health")
    page = httpx.get(f"{face.metrics}/metrics").text
    line = next(
        line
        for line in page.splitlines()
        if line.startswith("halfmoon_http_requests_total{") and 'method="HEAD"' in line and "/health" in line
    )
    assert 'status="200"' in line
