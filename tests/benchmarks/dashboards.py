"""halfmoon bench dashboards [--out FOLDER] [--seconds N]: the dashboards over a cluster under load.

The members of a demo cluster, in this process and without Ray; Prometheus that finds them by /metrics/targets; requests of several kinds.
Then every panel's query has to return data, and the dashboards are drawn. Needs the prometheus command. No figure comes from it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from halfmoon.client import AsyncClient, HalfmoonError
from halfmoon.deploy.actors import ProxyActor, StoreActor, WorkerActor
from halfmoon.deploy.cli.dashboards import DEPLOY, arguments, configure
from halfmoon.deploy.cluster import make_spec
from halfmoon.deploy.dashboards.draw import Source, draw
from halfmoon.deploy.ray_session import RayNode
from halfmoon.engine.worker_life import WorkerAddress
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.roles import WorkerRole

CONFIG = ClusterConfig(
    proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0, policy="kvcache_centric", ttft_slo_s=1.0, tpot_slo_s=0.1),
    prefill=PrefillConfig(num_workers=1),
    decode=DecodeConfig(num_workers=2),
    store=StoreConfig(arena_bytes=24 * 2**20),
)
DOCUMENTS = [f"Document {number}. " + f"The keeper of house {number} paints it in blue. " * 20 for number in range(5)]
OPTIONAL = "Needs a device"  # how the description of a panel begins that has no data on every machine
NUM_USERS = 3


@contextlib.contextmanager
def prometheus(proxy: str, port: int, folder: Path) -> Iterator[Source]:
    """Scrapes every second until it is left."""
    config = configure(folder / "config", proxy, interval="1s")
    with subprocess.Popen([shutil.which("prometheus") or "prometheus", *arguments(config, folder / "data", port)]) as process:
        try:
            yield Source(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


async def load(address: str, seconds: float) -> int:
    """Users in a closed loop; returns the number of answers."""
    async with AsyncClient(address) as client:
        return sum(await asyncio.gather(*(_user(client, number, time.monotonic() + seconds) for number in range(NUM_USERS))))


async def _user(client: AsyncClient, number: int, until: float) -> int:
    num_answers = turn = 0
    while time.monotonic() < until:
        turn += 1
        document = DOCUMENTS[(turn * (number + 1)) % len(DOCUMENTS)]
        slo = {"ttft_slo_s": 0.05, "tpot_slo_s": 1.0} if turn % 4 == 0 else {}
        stream = client.stream(prompt=f"{document} Question {number}.{turn}?", max_tokens=24 + 8 * number, ignore_eos=True, **slo)
        async for _ in stream.text():
            pass
        num_answers += 1
        if turn % 5 == 0:
            with contextlib.suppress(HalfmoonError):  # a refusal is what it is for
                await client.generate(prompt="x", max_tokens=10**6)
    return num_answers


def empty_panels(source: Source, span_s: float = 30.0) -> list[str]:
    """Those whose queries return nothing, or nothing but NaN."""
    found: list[str] = []
    for board in sorted((DEPLOY / "grafana").glob("*.json")):
        for panel in json.loads(board.read_text())["panels"]:
            if not panel.get("description", "").startswith(OPTIONAL):
                name = f"{board.stem}: {panel['title']}"
                found += [f"{name}: {target['expr']}" for target in panel.get("targets", []) if not _has(source, target, span_s)]
    return found


def _has(source: Source, target: dict[str, Any], span_s: float) -> bool:
    return any(value == value for one in source.ask(target, span_s) for value in one.values)


async def scraped(source: Source, num_targets: int) -> None:
    """Until so many targets are up."""
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, IndexError):
            found = await asyncio.to_thread(source.ask, {"expr": "sum(up)", "instant": True}, 0.0)
            if found[0].values[0] >= num_targets:
                return
        await asyncio.sleep(0.5)


class Members(NamedTuple):
    metrics_address: str
    grpc_address: str
    num_processes: int  # that would be


@contextlib.asynccontextmanager
async def members(config: ClusterConfig = CONFIG) -> AsyncIterator[Members]:
    """What Ray's actors run, as plain objects on this loop."""
    node = RayNode("node-0", "127.0.0.1", 0.0)
    spec = make_spec(config, [node])
    options, name = spec.config.model, spec.config.model.name
    async with contextlib.AsyncExitStack() as stack:
        credentials = Credentials.make()
        proxy = ProxyActor(
            config=config.proxy, options=options, model_folder=str(spec.model_folder), schema=spec.schema, credentials=credentials
        )
        stack.push_async_callback(proxy.stop, 1.0)
        _, grpc_address, control_address, metrics_address = await proxy.start()
        common: Any = {"node_id": node.node_id, "host": node.host, "proxy_address": control_address, "credentials": credentials}
        store = StoreActor(
            **common, store_id="store-0", port=0, config=config.store, schema=spec.schema, max_model_len=spec.max_model_len, model_name=name
        )
        stack.push_async_callback(store.stop, 1.0)
        store_address = await store.start()
        workers: dict[str, WorkerRole] = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
        for worker_id, role in workers.items():
            address = WorkerAddress(worker_id=worker_id, store_address=store_address, **common)
            worker = WorkerActor(worker_address=address, options=options, role=role, prefill=config.prefill, decode=config.decode)
            stack.push_async_callback(worker.stop, 1.0)
            await worker.start()
        yield Members(metrics_address, grpc_address, 2 + len(workers))


async def run(out: Path | None, seconds: float, port: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        async with members() as found:
            with prometheus(found.metrics_address, port, Path(folder)) as source:
                await scraped(source, found.num_processes)
                num_answers = await load(found.grpc_address, seconds)
                empty = await asyncio.to_thread(empty_panels, source)
                print(f"{num_answers} answers in {seconds:g} s; {len(empty)} queries without data", *empty, sep="\n")
                if out is not None:
                    out.mkdir(parents=True, exist_ok=True)
                    for board in sorted((DEPLOY / "grafana").glob("*.json")):
                        await asyncio.to_thread(draw, board, source, seconds, out / f"dashboard-{board.stem}.png")
    return len(empty)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for pictures")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--port", type=int, default=19090)
    chosen = parser.parse_args()
    raise SystemExit(asyncio.run(run(chosen.out, chosen.seconds, chosen.port)) > 0)
