"""proxy/server.py: both faces up, ports, drain; and proxy/requests/readiness.py."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from halfmoon.client import Client
from halfmoon.protocol.config import PORTS, ModelOptions, ProxyConfig
from halfmoon.protocol.errors import CheckpointError, ConfigError, Draining, NoWorker
from halfmoon.protocol.schema import KVSchema
from halfmoon.proxy.server import ProxyServer
from halfmoon.tests.listening import listening_sockets
from halfmoon.tests.waiting import until

SCHEMA = KVSchema(model_fingerprint="faces", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=16)


def server(folder: Path, **config: Any) -> ProxyServer:
    values = {**dict.fromkeys(PORTS, 0), **config}
    return ProxyServer(config=ProxyConfig(**values), options=ModelOptions(), model_folder=folder, schema=SCHEMA)


async def test_free_ports_are_told_and_signal_handlers_left_alone(chat_model_folder: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    proxy = server(chat_model_folder)
    endpoints = await proxy.start()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://{endpoints.http}/health")).status_code == 200
        ready = await http.get(f"http://{endpoints.http}/ready")
        assert ready.status_code == 503
        assert ready.json()["missing"] == ["no decode worker has joined"]
        reply = await http.post(f"http://{endpoints.http}/v1/completions", json={"prompt": "x"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker")
    await proxy.stop(1.0)
    await proxy.stop(1.0)  # again is nothing
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{endpoints.http}/health")


@pytest.mark.parametrize("key", PORTS)
async def test_a_taken_port_is_refused_in_one_line_and_nothing_listens_any_more(key: str, chat_model_folder: Path) -> None:
    before = listening_sockets()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is taken.*proxy\.{key}") as caught:
            await server(chat_model_folder, **{key: port}).start()
    assert "\n" not in caught.value.message and caught.value.fields == {"key": f"proxy.{key}"}
    await until(lambda: listening_sockets() == before)


async def test_a_start_that_fails_behind_its_ports_leaves_none_of_them(chat_model_folder: Path) -> None:
    before = listening_sockets()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        proxy = server(chat_model_folder, kv_events_endpoint=f"tcp://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError, match="kv_events_endpoint"):
            await proxy.start()
    await until(lambda: listening_sockets() == before)
    await proxy.stop(0.0)  # again is nothing


async def test_a_fixed_port_is_taken_again_after_a_restart(chat_model_folder: Path) -> None:
    proxy = server(chat_model_folder)
    endpoints = await proxy.start()
    await proxy.stop(0.0)
    again = server(chat_model_folder, **{key: int(address.rsplit(":", 1)[1]) for key, address in zip(PORTS, endpoints, strict=True)})
    assert await again.start() == endpoints
    await again.stop(0.0)


def test_a_kept_connection_answers_at_once(face: Any) -> None:
    """Without TCP_NODELAY each reply waits some 40 ms for an ACK."""
    with httpx.Client(base_url=face.http) as http:
        took_s: list[float] = []
        while min(took_s, default=1.0) >= 0.030:  # an ACK that is waited for delays every one of them
            assert len(took_s) < 200, took_s
            begun = time.perf_counter()
            assert http.get("/health").status_code == 200
            took_s.append(time.perf_counter() - begun)


async def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        server(tmp_path)


def test_stop_lets_the_last_request_end_and_takes_no_new_one(make_face: Callable[..., Any]) -> None:
    face = make_face()
    face.workers.gate_at = 3
    texts: list[str] = []
    with Client(face.grpc) as client:
        reader = threading.Thread(target=lambda: texts.append(client.generate(prompt="Hello", max_tokens=5).text))
        reader.start()
        assert face.workers.arrived.wait(60)
        stopping = asyncio.run_coroutine_threadsafe(face.server.stop(600.0), face._loop)
        while not (missing := httpx.get(f"{face.http}/ready").json()["missing"]):
            pass
        assert missing == ["the proxy is draining and takes no new requests"]
        with pytest.raises(Draining):
            client.generate(prompt="x")
        assert httpx.post(f"{face.http}/v1/completions", json={"prompt": "x"}).json()["error"]["code"] == "draining"
        face.open_gate()
        stopping.result(60)  # well before its grace is over
        reader.join()
    assert texts == ["The quick brown fox,"]


def test_stop_cancels_what_outlasts_its_grace(make_face: Callable[..., Any]) -> None:
    face = make_face()
    face.workers.gate_at = 3
    with Client(face.grpc) as client, client.stream(prompt="Hello") as stream:
        while "brown" not in getattr(next(stream), "text", ""):
            pass
        face.call(face.server.stop(0.1))  # the answer is held at a gate: only the cancel ends it
        assert face.workers.cancelled.wait(60)


def test_a_worker_that_leaves_makes_the_proxy_unready(make_face: Callable[..., Any]) -> None:
    face = make_face()
    face.call(face.workers.stop())
    while httpx.get(f"{face.http}/ready").status_code == 200:
        pass
    with Client(face.grpc) as client, pytest.raises(NoWorker):
        client.generate(prompt="x")
    with grpc.insecure_channel(face.grpc) as channel:
        grpc.channel_ready_future(channel).result(60)  # the process itself is well
