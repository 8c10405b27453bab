"""The clients' ports under a new certificate: new connections see it, streams go on, and a bad file changes nothing."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from halfmoon.client import Client
from halfmoon.deploy.certificates import init, rotate
from halfmoon.protocol import watched_files
from halfmoon.protocol.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init(tmp_path / "certs", [], 1)
    return tmp_path / "certs"


@pytest.fixture
def face(make_face: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """It looks for new files all the time."""
    monkeypatch.setattr(watched_files, "LOOK_INTERVAL_S", 0.01)
    found = make_face(tls_certificate=str(folder / "front.pem"), tls_key=str(folder / "front.key"))
    found.http = found.http.replace("http:", "https:")
    return found


def until(holds: Callable[[], bool]) -> None:
    """Bounded as a guard against a hang."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def shown(address: str) -> str:
    host, port = address.removeprefix("https://").split(":")
    return ssl.get_server_certificate((host, int(port)), timeout=60)


def test_a_stream_goes_on_while_new_connections_see_the_new_certificate(face: Any, folder: Path) -> None:
    trusting, authority = ssl.create_default_context(cafile=str(folder / "authority.pem")), (folder / "authority.pem").read_bytes()
    before = (folder / "front.pem").read_text()
    assert shown(face.http) == shown(face.grpc) == before
    face.workers.gate_at = 1
    with httpx.Client(base_url=face.http, verify=trusting, timeout=60) as http, Client(face.grpc, authority=authority) as client:
        with http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data:")
            tokens = iter(client.stream(prompt="x"))
            next(tokens)
            rotate(folder, [], 1)
            after = (folder / "front.pem").read_text()
            until(lambda: shown(face.http) == after and shown(face.grpc) == after)
            assert httpx.get(f"{face.http}/health", verify=trusting, timeout=60).status_code == 200
            face.open_gate()
            assert [line for line in lines if line][-1] == "data: [DONE]"
            assert list(tokens)
        assert http.get("/health").status_code == 200, "the connection from before"
    assert after != before


def test_a_bad_file_is_refused_and_the_old_certificate_goes_on(face: Any, folder: Path) -> None:
    before = (folder / "front.pem").read_text()
    for file in ("front.pem", "front.key"):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:150])
        with pytest.raises(ConfigError, match="can't be used"):
            face.call(face.server.renew_front())
        assert shown(face.http) == shown(face.grpc) == before
        (folder / file).write_bytes(whole)
