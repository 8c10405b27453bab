"""Metrics pages of a cluster with certificates, and with a token."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from halfmoon.deploy.certificates import init, rotate
from halfmoon.deploy.page_opener import page_opener
from halfmoon.protocol import exporter, metrics
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.errors import ConfigError
from halfmoon.protocol.tls import Tls

TOKEN = "0123456789abcdef0123456789abcdef"


def test_a_page_shows_the_members_certificate_the_new_one_after_a_change(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    init(ours, [], 1)
    init(others, [], 1)
    credentials = Credentials(TOKEN, Tls.of_members(ours))
    registry = CollectorRegistry()
    exporter.gauge(metrics.KV_CACHE_USAGE, registry).set(0.5)
    address, stop = exporter.serve_metrics(registry, "127.0.0.1", targets=lambda asked: [asked], credentials=credentials)
    host, port = address.split(":")

    def read(folder: Path, path: str) -> str:
        with page_opener(Tls.of_members(folder).authority)(f"{address}{path}", 60.0) as reply:
            return reply.read().decode()

    with contextlib.closing(socket.create_connection((host, int(port)))) as silent:
        try:
            assert "halfmoon_kv_cache_usage_ratio 0.5" in read(ours, "/metrics") and read(ours, "/metrics/targets") == f'["{address}"]'
            for folder in (ours, others):
                assert ssl.get_server_certificate((host, int(port)), timeout=60).encode() == Tls.of_members(ours).certificate
                with pytest.raises((OSError, http.client.HTTPException)):
                    urllib.request.urlopen(f"http://{address}/metrics", timeout=60)  # in the clear
                if folder is others:
                    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                        read(others, "/metrics")
                rotate(ours, [], 1)
                credentials.renew(Tls.of_members(ours))
                assert "halfmoon_kv_cache_usage_ratio 0.5" in read(ours, "/metrics")
        finally:
            stop()
        assert silent.fileno() >= 0, "who says nothing keeps nobody from the page"
    assert "Traceback" not in capfd.readouterr().err


def test_without_certificates_the_page_is_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        address, stop = exporter.serve_metrics(CollectorRegistry(), "127.0.0.1", credentials=Credentials(TOKEN))
        with page_opener(None)(f"{address}/metrics", 60.0) as reply:
            assert reply.status == 200
        stop()


@pytest.mark.parametrize("path", ["/metrics", "/metrics/targets"])
def test_a_page_with_a_token_opens_to_it_and_to_the_clusters_and_to_nobody_else(path: str) -> None:
    credentials = Credentials(TOKEN, metrics_token="m" * 32)
    address, stop = exporter.serve_metrics(CollectorRegistry(), "127.0.0.1", targets=lambda asked: [asked], credentials=credentials)
    try:
        for token in ("m" * 32, TOKEN):
            with page_opener(None, token)(f"{address}{path}", 60.0) as reply:
                assert reply.status == 200
        for token in ("", "m" * 31, "m" * 33, "M" * 32, "x"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                page_opener(None, token)(f"{address}{path}", 60.0)
            assert (caught.value.code, caught.value.headers["www-authenticate"]) == (401, "Bearer")
            assert "halfmoon_" not in caught.value.read().decode()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(f"http://{address}{path}", headers={"authorization": f"Basic {'m' * 32}"}))
    finally:
        stop()


def test_a_metrics_token_is_refused_if_it_is_short_and_is_shown_nowhere() -> None:
    assert "m" * 32 not in repr(Credentials(TOKEN, metrics_token="m" * 32))
    with pytest.raises(ConfigError, match="32 characters or more") as caught:
        Credentials(TOKEN, metrics_token="short")
    assert "short" not in caught.value.message
