"""A cluster as `halfmoon doctor` sees it, in one process: a scripted Status, a real store, real metrics pages, and processes to stop."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc.aio
import pytest

import halfmoon.deploy.doctor.examine as module
import halfmoon.deploy.doctor.links as links
from halfmoon import client
from halfmoon.client import PhaseRecord, Usage
from halfmoon.deploy.doctor.probe import Probe, judge
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.channel import create_server
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.grpc_errors import unary_boundary
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc

SCHEMA = KVSchema(model_fingerprint="f" * 16, dtype="float32", num_layers=2, num_kv_heads=2, head_dim=16, block_size=16)
NODE = "node-a"
NUM_SLOTS = 64
PHASES = PhaseRecord(prefill_s=0.02, ttft_s=0.03, tpot_s=0.01, predicted_ttft_s=0.03, prefill_worker="prefill-0", decode_worker="decode-0")
ROLES = {"prefill-0": control_pb2.ROLE_PREFILL, "decode-0": control_pb2.ROLE_DECODE, "store-0": control_pb2.ROLE_STORE}


class Control(control_pb2_grpc.ControlServicer):
    def __init__(self) -> None:
        self.reply = control_pb2.StatusReply(model="demo", policy="cache_aware")

    @unary_boundary
    async def Status(self, request: control_pb2.StatusRequest, context: grpc.aio.ServicerContext) -> control_pb2.StatusReply:
        return self.reply


class MetricsPage:
    """A worker's page: how many prompt tokens it has computed."""

    def __init__(self, num_tokens: int) -> None:
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = f'halfmoon_step_tokens_total{{worker="w",role="prefill"}} {page.num_tokens}\n'.encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def date_time_string(self, timestamp: float | None = None) -> str:
                import time

                return super().date_time_string(int(time.time() + page.skew_s))

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.num_tokens, self.skew_s = num_tokens, 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))  # by default its end comes up to 0.5 s late
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@dataclass
class Site:
    """One of each member. `status` is what the proxy tells; a test plants its fault in it, or in the store."""

    address: str
    status: control_pb2.StatusReply
    store: StoreServer
    pages: dict[str, MetricsPage]

    def member(self, name: str) -> control_pb2.StatusReply.Member:
        return next(one for one in self.status.members if one.info.id == name)

    def lose(self, name: str, why: str) -> None:
        """As the proxy tells of a member that left."""
        lost = self.member(name)
        self.status.absences.add(info=lost.info, why=why, for_s=7)
        self.status.members.remove(lost)

    async def findings(self) -> list[Any]:
        return (await self.report()).findings

    async def report(self) -> Any:
        return await module.examine_cluster(self.address, client.Control(self.address, "no-token-is-asked-for-by-this-proxy"))


def add_member(status: control_pb2.StatusReply, name: str, address: str, page: str) -> None:
    info = control_pb2.MemberInfo(id=name, role=ROLES[name], address=address, node_id=NODE, store_id="store-0", metrics_address=page)
    if name == "store-0":
        info.kv_capacity_tokens = NUM_SLOTS * SCHEMA.block_size
    else:
        info.schema.CopyFrom(SCHEMA.to_proto())
        info.max_model_len, info.kv_capacity_tokens = 512, 2048
    status.members.add(info=info, role=ROLES[name], up_s=60)


@pytest.fixture
def store_schema() -> KVSchema:
    return SCHEMA


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch, store_schema: KVSchema) -> AsyncIterator[Site]:
    control = Control()
    server, port = create_server("127.0.0.1", 0)
    control_pb2_grpc.add_ControlServicer_to_server(control, server)
    await server.start()
    store = StoreServer(StoreConfig(arena_bytes=NUM_SLOTS * SCHEMA.block_bytes), node_id=NODE, store_id="store-0", schema=store_schema)
    store_address = await store.start("127.0.0.1")
    pages = {name: MetricsPage(100 if name == "prefill-0" else 0) for name in ROLES}
    for name, page in pages.items():
        add_member(control.reply, name, store_address if name == "store-0" else page.address, page.address)
    control.reply.outcomes["done"] = 5

    async def probe(address: str, max_model_len: int, api_key: str, authority: bytes | None) -> Probe:
        return Probe(PHASES, Usage(10, 16, 0), judge(PHASES))

    monkeypatch.setattr(module, "send_probe", probe)
    # a busy machine makes any link slow; a test that wants one sets bounds of its own
    monkeypatch.setattr(links, "SLOW_BYTES_PER_S", {"shm": 0.0, "tcp": 0.0, "grpc": 0.0})
    yield Site(f"127.0.0.1:{port}", control.reply, store, pages)
    for page in pages.values():
        page.close()
    await store.stop(0)
    await server.stop(None)


@pytest.fixture
def process() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a process that waits; each is ended after the test, stopped or not."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()
