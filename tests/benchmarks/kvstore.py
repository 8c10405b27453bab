"""The KV store alone: bytes in and out, look-ups among a million blocks, what an index entry takes.

    halfmoon bench kvstore [--out FILE.json] [--clients 1,4] [--mooncake PYTHON] [--seconds 1.0] [--sizes 65536,...] [--certs FOLDER]

store (a process) ◄── sessions of this process: put = Reserve, push, Seal; get = Fetch, every byte received, every checksum compared
Beside them in the same run: memcpy, a raw TCP socket between two processes, Mooncake's transfer engine over TCP (no checksums).
A rate is the median over transfers, `best` the fastest of them (on a machine that others load, the one to compare); with several
clients their sum. CPU: of both processes, for one GB. --out also draws FILE.png.
`pinned`: the store on one half of the cores and this process on the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from halfmoon.kvstore.arena import Arena
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.kvstore.store import Store
from halfmoon.protocol.blocks import KEY_BYTES
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.errors import RequestCancelled
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.tls import Tls
from halfmoon.protocol.v1 import common_pb2, kvstore_pb2

NODE = "bench"
SIZES = [64 * 2**10, 2**20, 16 * 2**20, 64 * 2**20]
SMALL = KVSchema(model_fingerprint="s" * 16, dtype="bfloat16", num_layers=1, num_kv_heads=2, head_dim=128, block_size=64)  # 64 KiB a block
LARGE = KVSchema(model_fingerprint="l" * 16, dtype="bfloat16", num_layers=32, num_kv_heads=8, head_dim=128, block_size=64)  # 8 MiB
TINY = KVSchema(model_fingerprint="t" * 16, dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=1, block_size=1)  # 4 bytes
NUM_INDEXED = 1_000_000
ARENA_BYTES = 1536 * 2**20
Row = dict[str, Any]


def show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def line(row: Row) -> str:
    name, size, clients = f"{row['what']} {row['direction']}", row["size"] / 2**20, row["clients"]
    return f"{name:18s} {size:6.2f} MiB x{clients:2d} {row['gb_s']:6.2f} GB/s, best {row['best']:6.2f}, {row['cpu_s_gb']:7.2f} CPU s/GB"


def pin(half: int) -> None:
    """Half of the cores this process may use: 0 or 1."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        middle = len(cores) // 2
        os.sched_setaffinity(0, cores[:middle] if half == 0 else cores[middle:])


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def anonymous_bytes(pid: int) -> int:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


class Child:
    """This file in a process of its own; it says an address and ends when its standard input does."""

    def __init__(self, *role: str) -> None:
        root = Path(__file__).resolve().parents[3]
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        command = [sys.executable, str(Path(__file__).resolve()), "--role", *role]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise SystemExit("a process of the benchmark ended early; its message stands above")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def credentials_of(certs: str) -> Credentials | None:
    """certs: a folder of certificates; "": without TLS."""
    return Credentials("of-a-benchmark-on-one-machine-alone", Tls.of_members(Path(certs))) if certs else None


async def run_store(arena_bytes: int, certs: str) -> None:
    pin(0)
    config = StoreConfig(arena_bytes=arena_bytes, lease_ttl_s=30.0)
    server = StoreServer(config, node_id=NODE, credentials=credentials_of(certs))
    show(await server.start("127.0.0.1"))
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


def run_socket() -> None:
    """Answers b"p" + size by receiving size bytes, b"g" + size by sending them."""
    pin(0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        show(str(listener.getsockname()[1]))
        connection = listener.accept()[0]
        data = memoryview(bytearray(max(SIZES)))
        while order := connection.recv(9, socket.MSG_WAITALL):
            size = int.from_bytes(order[1:], "little")
            if order[:1] == b"p":
                receive(connection, data[:size])
                connection.sendall(b".")
            else:
                connection.sendall(data[:size])


def receive(connection: socket.socket, view: memoryview) -> None:
    while view:
        view = view[connection.recv_into(view) :]


def timed(run: Callable[[], object], size: int, seconds: float, pids: tuple[int, ...] = ()) -> Row:
    """GB/s, and CPU seconds a GB of this process and the others."""
    rates: list[float] = []
    run()
    began, used = time.perf_counter(), time.process_time() + sum(map(cpu_s, pids))
    while time.perf_counter() - began < seconds or len(rates) < 4:
        start = time.perf_counter()
        run()
        rates.append(size / (time.perf_counter() - start) / 1e9)
    used = time.process_time() + sum(map(cpu_s, pids)) - used
    return {"gb_s": statistics.median(rates), "best": max(rates), "cpu_s_gb": used / (len(rates) * size / 1e9)}


def measure_memcpy(sizes: list[int], seconds: float) -> list[Row]:
    rows: list[Row] = []
    for size in sizes:
        source, target = np.full(4 * size, 7, np.uint8), np.zeros(4 * size, np.uint8)
        turn = iter(range(10**9))

        def copy(source: np.ndarray = source, target: np.ndarray = target, size: int = size, turn: Any = turn) -> None:
            start = next(turn) % 4 * size  # not the same cache lines again
            target[start : start + size] = source[start : start + size]

        rows.append({"what": "memcpy", "size": size, "clients": 1, "direction": "put", **timed(copy, size, seconds)})
    return rows


def measure_socket(sizes: list[int], seconds: float) -> list[Row]:
    child, rows = Child("socket"), []
    with socket.create_connection(("127.0.0.1", int(child.address))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = memoryview(bytearray(max(sizes)))
        for size in sizes:

            def put(size: int = size) -> None:
                connection.sendall(b"p" + size.to_bytes(8, "little"))
                connection.sendall(data[:size])
                receive(connection, memoryview(bytearray(1)))

            def get(size: int = size) -> None:
                connection.sendall(b"g" + size.to_bytes(8, "little"))
                receive(connection, data[:size])

            for direction, run in (("put", put), ("get", get)):
                rows.append(
                    {
                        "what": "raw TCP",
                        "size": size,
                        "clients": 1,
                        "direction": direction,
                        **timed(run, size, seconds, (child.process.pid,)),
                    }
                )
    child.close()
    return rows


def measure_mooncake(python: str, sizes: list[int], seconds: float) -> list[Row]:
    command = [python, str(Path(__file__).with_name("mooncake_peer.py")), json.dumps(sizes), str(seconds)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"Mooncake's transfer engine: {done.stderr[-500:]}")
    return [{"what": "Mooncake TCP", "clients": 1, **row} for row in json.loads(done.stdout.splitlines()[-1])]


class Transfers:
    """One session's puts and gets of `size` bytes, each put under keys of its own."""

    def __init__(self, client: StoreClient, schema: KVSchema, size: int) -> None:
        self.client = client
        self._schema = schema
        self._size = size
        self._num_blocks = size // schema.block_bytes
        self._blocks = np.random.default_rng(0).integers(0, 256, (schema.num_layers, self._num_blocks, schema.layer_bytes), np.uint8)
        self._copy = np.zeros(self._blocks.shape, np.uint8) if client.transport == "shm" else None
        self._keys: list[bytes] = []

    async def put(self) -> None:
        self._keys = [secrets.token_bytes(KEY_BYTES) for _ in range(self._num_blocks)]
        writer = await self.client.cache(self._keys, 30.0)
        if self._size <= 2**20:
            for layer, blocks in enumerate(self._blocks):
                writer.push(layer, 0, blocks)
        else:
            await asyncio.to_thread(lambda: [writer.push(layer, 0, blocks) for layer, blocks in enumerate(self._blocks)])
        await writer.seal(common_pb2.HandoffState())

    async def get(self) -> None:
        reader = await self.client.fetch_prefix(self._keys)
        if reader.num_blocks != self._num_blocks:
            raise SystemExit(f"{reader.num_blocks} of {self._num_blocks} blocks are there")
        async for part in reader.slices():
            if self._copy is not None:  # over shm a slice is a view: the copy out belongs to the get
                await asyncio.to_thread(self._copy_out, part)
        await reader.release()

    def _copy_out(self, part: Any) -> None:
        assert self._copy is not None
        target = self._copy[part.layer : part.layer + part.num_layers]
        for index, block in enumerate(part.blocks):
            target[:, part.first_block + index] = block.reshape(part.num_layers, -1)


async def rate(runs: list[Callable[[], Awaitable[None]]], size: int, seconds: float) -> Row:
    """GB/s of all runs together, each again and again."""
    for run in runs:
        await run()
    times: list[float] = []
    began = time.perf_counter()

    async def again(run: Callable[[], Awaitable[None]]) -> None:
        while time.perf_counter() - began < seconds or len(times) < 4:
            start = time.perf_counter()
            await run()
            times.append(time.perf_counter() - start)

    await asyncio.gather(*map(again, runs))
    total = len(runs) * size / 1e9
    return {"gb_s": total / statistics.median(times), "best": total / min(times)}


async def measure_store(transport: Any, sizes: list[int], clients: list[int], seconds: float, certs: str) -> list[Row]:
    rows: list[Row] = []
    credentials, suffix = credentials_of(certs), " TLS" if certs else ""
    for schema in (SMALL, LARGE):
        child = Child("store", str(ARENA_BYTES), certs)
        fitting = [size for size in sizes if (size >= LARGE.block_bytes) == (schema is LARGE)]
        for size in fitting:
            for num_clients in clients:
                sessions = [
                    await StoreClient.attach(
                        child.address, client_id=f"c{index}", node_id=NODE, schema=schema, transport=transport, credentials=credentials
                    )
                    for index in range(num_clients)
                ]
                transfers = [Transfers(session, schema, size) for session in sessions]
                for direction in ("put", "get"):
                    before, moved = cpu_s(child.process.pid) + time.process_time(), await sessions[0].stats()
                    found = await rate([getattr(one, direction) for one in transfers], size, seconds)
                    after = await sessions[0].stats()
                    num_bytes = after.num_bytes_pushed + after.num_bytes_fetched - moved.num_bytes_pushed - moved.num_bytes_fetched
                    found["cpu_s_gb"] = (cpu_s(child.process.pid) + time.process_time() - before) / (num_bytes / 1e9)
                    row = {"what": sessions[0].transport + suffix, "size": size, "clients": num_clients, "direction": direction, **found}
                    rows.append(row)
                    show(line(row))
                for session in sessions:
                    await session.close()
        child.close()
    return rows


async def measure_index() -> Row:
    """Look-ups of 128k-token prompts (2,048 keys) and Reserves of 128 blocks among a million blocks while four clients push."""
    child = Child("store", str((NUM_INDEXED + 50_000) * TINY.block_bytes), "")
    clients = [await StoreClient.attach(child.address, client_id=f"c{index}", node_id=NODE, schema=TINY) for index in range(5)]
    asking = clients.pop()
    before = anonymous_bytes(child.process.pid)
    chains: list[list[bytes]] = []
    for _ in range(NUM_INDEXED // 10_000):
        chains.append([secrets.token_bytes(KEY_BYTES) for _ in range(10_000)])
        await push_tiny(asking, chains[-1])
    entry_bytes = (anonymous_bytes(child.process.pid) - before) / NUM_INDEXED
    stop = asyncio.Event()

    async def load(client: StoreClient) -> None:
        while not stop.is_set():
            await push_tiny(client, [secrets.token_bytes(KEY_BYTES) for _ in range(64)])

    pushing = [asyncio.create_task(load(client)) for client in clients]
    times: dict[str, list[float]] = {"lookup": [], "reserve": []}
    for turn in range(600):
        keys = chains[-1 - turn % 50][:2048]
        began = time.perf_counter()
        held = await asking.lookup(keys)
        times["lookup"].append(time.perf_counter() - began)
        if held != len(keys):
            raise SystemExit(f"{held} of {len(keys)} blocks found")
        began = time.perf_counter()
        writer = await asking.cache([secrets.token_bytes(KEY_BYTES) for _ in range(128)], 30.0)
        times["reserve"].append(time.perf_counter() - began)
        await writer.abort(RequestCancelled("the benchmark wanted the time alone"))
    stop.set()
    await asyncio.gather(*pushing)
    row: Row = {"what": "index", "num_blocks": NUM_INDEXED, "entry_bytes": entry_bytes, **await index_cpu()}
    for name, found in times.items():
        row |= {f"{name}_p50_ms": 1e3 * statistics.median(found), f"{name}_p99_ms": 1e3 * float(np.quantile(found, 0.99))}
    for client in (asking, *clients):
        await client.close()
    child.close()
    show(json.dumps(row))
    return row


async def index_cpu() -> Row:
    """CPU of the store's event loop for the same: a look-up from its message to its reply, and four pushes of 64 blocks between two."""
    arena = Arena((NUM_INDEXED + 50_000) * TINY.block_bytes)
    try:
        store = Store(StoreConfig(lease_ttl_s=600), arena, store_id="store", node_id=NODE)
        session, _ = store.attach(kvstore_pb2.AttachRequest.Hello(client_id="c", node_id=NODE, schema=TINY.to_proto()))

        async def push(keys: list[bytes]) -> None:
            purpose = kvstore_pb2.ReserveRequest.PURPOSE_CACHE
            request = kvstore_pb2.ReserveRequest(session_id=session.session_id, purpose=purpose, block_keys=keys, num_blocks=len(keys))
            lease = await store.reserve(request)
            store.push(lease.lease_id, kvstore_pb2.PushRequest(num_blocks=len(keys), num_layers=TINY.num_layers))
            store.seal(kvstore_pb2.SealRequest(lease_id=lease.lease_id, checksums=[1] * len(keys)))

        chains = [[secrets.token_bytes(KEY_BYTES) for _ in range(10_000)] for _ in range(NUM_INDEXED // 10_000)]
        for chain in chains:
            await push(chain)
        lookups, pushes = list[float](), list[float]()
        for turn in range(600):
            asked = kvstore_pb2.LookupRequest(block_keys=chains[-1 - turn * 7 % 50][:2048]).SerializeToString()
            began = time.thread_time()
            found = store.tiers.lookup(kvstore_pb2.LookupRequest.FromString(asked).block_keys)
            kvstore_pb2.LookupReply(**found._asdict()).SerializeToString()
            lookups.append(time.thread_time() - began)
            for _ in range(4):
                fresh = [secrets.token_bytes(KEY_BYTES) for _ in range(64)]
                began = time.thread_time()
                await push(fresh)
                pushes.append(time.thread_time() - began)
        await store.drain(0)
        return {
            f"{name}_cpu_{label}_ms": 1e3 * float(np.quantile(times, share))
            for name, times in (("lookup", lookups), ("push_64", pushes))
            for label, share in (("p50", 0.5), ("p99", 0.99))
        }
    finally:
        arena.close()


async def push_tiny(client: StoreClient, keys: list[bytes]) -> None:
    writer = await client.cache(keys, 30.0)
    await asyncio.to_thread(writer.push, 0, 0, np.zeros((len(keys), TINY.layer_bytes), np.uint8))
    await writer.seal(common_pb2.HandoffState())


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, direction in zip(axes, ("put", "get"), strict=True):
        names = list(dict.fromkeys(row["what"] for row in rows if row.get("clients") == 1))
        for name in names:
            found = [row for row in rows if row["what"] == name and row.get("clients") == 1]
            points = [(row["size"] / 2**20, row["gb_s"]) for row in found if row["direction"] == direction or name == "memcpy"]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(title=f"{direction}, one client", xscale="log", yscale="log", xlabel="MiB", ylabel="GB/s")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--clients", default="1")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--transports", default="auto,tcp,grpc")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--mooncake", default="", help="a Python that has Mooncake's wheel")
    parser.add_argument("--certs", default="", help="folder of `halfmoon certs init`: the store's connections have TLS")
    parser.add_argument("--no-index", action="store_true")
    parser.add_argument("--role", nargs="+")
    options = parser.parse_args()
    if options.role:
        asyncio.run(run_store(int(options.role[1]), options.role[2])) if options.role[0] == "store" else run_socket()
        return
    sizes, clients = [int(size) for size in options.sizes.split(",")], [int(number) for number in options.clients.split(",")]
    load = os.getloadavg()[0]
    rows = measure_mooncake(options.mooncake, sizes, options.seconds) if options.mooncake else []
    pin(1)
    rows += measure_memcpy(sizes, options.seconds) + measure_socket(sizes, options.seconds)
    for row in rows:
        show(line(row))
    for transport in options.transports.split(","):
        rows += asyncio.run(measure_store(transport, sizes, clients, options.seconds, options.certs))
    if not options.no_index:
        rows.append(asyncio.run(measure_index()))
    if options.out:
        machine = {"cores": os.cpu_count(), "load_before": load, "python": sys.version.split()[0]}
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        draw([row for row in rows if "gb_s" in row], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
