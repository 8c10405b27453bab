"""Twenty members found from one address: real pages with TLS and a token, which a real Prometheus scrapes where there is one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from halfmoon.deploy.certificates import init
from halfmoon.deploy.cli.dashboards import arguments, configure
from halfmoon.deploy.page_opener import page_opener
from halfmoon.engine.resolve import DEMO_FOLDER
from halfmoon.protocol.config import PORTS, ModelOptions, ProxyConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.exporter import Identity, ProcessMetrics, serve_metrics
from halfmoon.protocol.membership import stay_joined
from halfmoon.protocol.roles import ROLE_NUMBERS
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.tls import Tls
from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.server import ProxyServer
from halfmoon.tests.deploy.registries import store_registry, worker_registry

MODEL = "halfmoon-demo"
MEMBERS = {
    **{f"prefill-{number}": "prefill" for number in range(6)},
    **{f"decode-{number}": "decode" for number in range(8)},
    **{f"both-{number}": "both" for number in range(2)},
    **{f"store-{number}": "store" for number in range(4)},
}
NUM_TARGETS = len(MEMBERS) + 1  # the proxy
SCHEMA = KVSchema(model_fingerprint="targets", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=16)
HANGS_AFTER_S = 60.0


@dataclass
class Pages:
    """Of a cluster whose members are pages and memberships."""

    address: str  # of the proxy's
    ca: Path
    token_file: Path

    def read(self, page: str) -> str:
        """page: host:port/path."""
        with page_opener(self.ca.read_bytes(), self.token_file.read_text())(page, HANGS_AFTER_S) as reply:
            return reply.read().decode()


def serve(member_id: str, role: str, credentials: Credentials) -> tuple[str, Callable[[], None]]:
    registry: CollectorRegistry = store_registry() if role == "store" else worker_registry()
    return serve_metrics(ProcessMetrics(registry, lambda: Identity(member_id, role, MODEL)), "127.0.0.1", credentials=credentials)


@pytest.fixture
async def pages(tmp_path: Path) -> AsyncIterator[Pages]:
    init(tmp_path / "certs", [], 1)
    token_file = tmp_path / "token"
    token_file.write_text("m" * 32)
    credentials = Credentials("c" * 32, Tls.of_members(tmp_path / "certs"), token_file.read_text())
    config = ProxyConfig(**dict.fromkeys(PORTS, 0))
    proxy = ProxyServer(config=config, options=ModelOptions(name=MODEL), model_folder=DEMO_FOLDER, schema=SCHEMA, credentials=credentials)
    endpoints = await proxy.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(proxy.stop, 0.0)
        joined = []
        for member_id, role in MEMBERS.items():
            address, stop = serve(member_id, role, credentials)
            stack.callback(stop)
            info = control_pb2.MemberInfo(
                id=member_id, incarnation="1", role=ROLE_NUMBERS[role], node_id="here", address="127.0.0.1:1", metrics_address=address
            )
            info.store_address, info.store_id = "127.0.0.1:1", "store-0"
            info.schema.CopyFrom(SCHEMA.to_proto())
            there = asyncio.Event()
            joined.append(there.wait())
            joining = asyncio.create_task(stay_joined(endpoints.control, info, control_pb2.MemberLoad, there.set, credentials=credentials))
            stack.push_async_callback(ended, joining)
        async with asyncio.timeout(HANGS_AFTER_S):
            await asyncio.gather(*joined)
        yield Pages(endpoints.metrics, tmp_path / "certs" / "authority.pem", token_file)


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def test_twenty_members_are_found_from_one_address_and_no_series_is_there_twice(pages: Pages) -> None:
    """As Prometheus does with honor_labels: a target's labels are added to the series that have none of that name."""
    listed = json.loads(await asyncio.to_thread(pages.read, f"{pages.address}/metrics/targets"))
    assert {one["labels"]["worker"]: one["labels"]["role"] for one in listed} == {"proxy": "proxy", **MEMBERS}
    assert all(one["labels"]["__scheme__"] == "https" for one in listed)
    seen: Counter[tuple[str, frozenset[tuple[str, str]]]] = Counter()
    for one in listed:
        (address,) = one["targets"]
        shown = {name: value for name, value in one["labels"].items() if not name.startswith("__")}
        text = await asyncio.to_thread(pages.read, f"{address}/metrics")
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        assert len(samples) > 10
        for sample in samples:
            labels = shown | sample.labels
            assert labels["worker"] == shown["worker"], sample
            seen[sample.name, frozenset(labels.items())] += 1
    assert [series for series, times in seen.items() if times > 1] == []


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed; Debian's package is called prometheus")
async def test_prometheus_has_every_target_up_and_no_two_series_differ_by_their_address_alone(pages: Pages, tmp_path: Path) -> None:
    config = configure(tmp_path / "prometheus", pages.address, interval="1s", ca=pages.ca, token_file=pages.token_file)
    ready = asyncio.Event()
    command = [argument for argument in arguments(config, tmp_path / "data", 0) if not argument.startswith("--log")]
    process = await asyncio.create_subprocess_exec("prometheus", *command, stderr=asyncio.subprocess.PIPE)
    told: list[str] = []

    async def listen() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            told.append(line.decode())
            if "ready to receive web requests" in told[-1]:
                ready.set()

    reading = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(2 * HANGS_AFTER_S):
            await ready.wait()
            line = next(line for line in told if "Listening on" in line)
            address = line.split("address=")[1].split()[0]
            while len(await asked(address, "up == 1 and on (worker) halfmoon_build_info")) < NUM_TARGETS:
                await asyncio.sleep(0.2)
        up = await asked(address, "up")
        assert {one["metric"]["worker"]: one["metric"]["role"] for one in up} == {"proxy": "proxy", **MEMBERS}
        found = [one["metric"] for one in await asked(address, '{__name__=~"halfmoon_.*|process_.*"}')]
        series = Counter(frozenset((name, value) for name, value in metric.items() if name != "instance") for metric in found)
        assert len(series) > 10 * NUM_TARGETS and [one for one, times in series.items() if times > 1] == []
        assert "rror on ingesting" not in "".join(told), "of samples that are there twice"
    finally:
        process.terminate()
        await process.wait()
        await ended(reading)


async def asked(address: str, query: str) -> list[dict[str, Any]]:
    """An instant query's result."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    reply = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=HANGS_AFTER_S).read())
    return json.loads(reply)["data"]["result"]
