"""A fault soak of the KV store alone: kills, broken connections, cancelled and slow clients, a disk that is full, fails and tears.

    halfmoon bench store_soak [--faults 10000] [--seed N] [--out FILE.json]

store (a process with an SSD tier, killed and started again) ◄── workers over shm, tcp and grpc, each op perhaps with a fault in its middle
A block's bytes follow from its key, so that everyone knows what was sealed under it. At the end: nobody holds anything, and the store's
books say so; every byte that was ever read was the right one; nothing took longer than HANG_S.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import hashlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.reader import BlockReader
from halfmoon.kvstore.server import StoreServer
from halfmoon.kvstore.ssd_files import SsdFiles
from halfmoon.kvstore.writer import BlockWriter
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.errors import HalfmoonError, InvalidRequest, StoreUnavailable, WorkerLost
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, kvstore_pb2

NODE = "soak"
SCHEMA = KVSchema(model_fingerprint="f" * 16, dtype="float32", num_layers=3, num_kv_heads=2, head_dim=64, block_size=16)  # 48 KiB a block
NUM_SLOTS, NUM_PLACES, NUM_CHAINS, MAX_BLOCKS = 64, 128, 40, 8
HANG_S = 60.0
DISK_FAULT = 0.1  # of reads and writes
TRANSPORTS = ("auto", "tcp", "grpc", "tcp")


def keys(chain: str, num_blocks: int) -> list[bytes]:
    return [hashlib.blake2b(f"{chain}/{index}".encode(), digest_size=16).digest() for index in range(num_blocks)]


def content(key: bytes) -> np.ndarray:
    """uint8 [num_layers, layer_bytes]."""
    data = hashlib.shake_128(key).digest(SCHEMA.block_bytes)
    return np.frombuffer(data, np.uint8).reshape(SCHEMA.num_layers, SCHEMA.layer_bytes)


def show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def run_store(port: int, folder: str, seed: int) -> None:
    """Its disk fails by itself; a byte in folder/faults for each time."""
    generator = random.Random(seed)
    tally = os.open(Path(folder, "faults"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write, read = SsdFiles.write, SsdFiles.read

    def failing_write(self: SsdFiles, place: int, key: bytes, checksum: int, block: np.ndarray) -> None:
        if generator.random() > DISK_FAULT:
            return write(self, place, key, checksum, block)
        os.write(tally, b"w")
        if generator.random() < 0.5:
            raise OSError(errno.ENOSPC, "the disk is full")
        torn = block.copy()
        torn[generator.randrange(len(torn)) :] = 0  # the rest never reached the disk
        return write(self, place, key, checksum, torn)

    def failing_read(self: SsdFiles, place: int, checksum: int, block: np.ndarray) -> bool:
        if generator.random() < DISK_FAULT:
            os.write(tally, b"r")
            if generator.random() < 0.5:
                raise OSError(errno.EIO, "the disk does not answer")
            time.sleep(0.02)  # or answers late
        return read(self, place, checksum, block)

    SsdFiles.write, SsdFiles.read = failing_write, failing_read
    config = StoreConfig(
        arena_bytes=NUM_SLOTS * SCHEMA.block_bytes,
        lease_ttl_s=10.0,
        ssd_path=str(Path(folder, "ssd")),
        ssd_bytes=NUM_PLACES * SCHEMA.block_bytes,
        ssd_free_ratio=0.4,
    )
    server = StoreServer(config, node_id=NODE, schema=SCHEMA)
    show(await server.start("127.0.0.1", port))
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


class StoreProcess:
    def __init__(self, folder: str, generator: random.Random) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self._port = taken.getsockname()[1]
        self._folder = folder
        self._generator = generator

    async def start(self) -> str:
        root = Path(__file__).resolve().parents[3]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        role = ["--role", str(self._port), self._folder, str(self._generator.randrange(2**32))]
        command = [sys.executable, str(Path(__file__).resolve()), *role]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        address = (await asyncio.to_thread(self.process.stdout.readline)).strip()
        if not address:
            raise SystemExit("the store did not start; its message stands above")
        return address

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def num_disk_faults(self) -> int:
        path = Path(self._folder, "faults")
        return path.stat().st_size if path.exists() else 0


class Soak:
    def __init__(self, seed: int, folder: str) -> None:
        self.random = random.Random(seed)
        self.store = StoreProcess(folder, self.random)
        self.faults: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.num_wrong = self.num_hangs = self.num_blocks_read = 0
        self.address = ""
        self._num_handoffs = 0
        self._running = True

    def num_faults(self) -> int:
        return self.faults.total() + self.store.num_disk_faults()

    async def run(self, num_faults: int) -> None:
        self.address = await self.store.start()
        workers = [asyncio.create_task(self._work(TRANSPORTS[index % len(TRANSPORTS)])) for index in range(8)]
        began, next_kill, told = time.monotonic(), num_faults // 12, 0
        while self.num_faults() < num_faults:
            await asyncio.sleep(0.05)
            if broken := next((worker for worker in workers if worker.done()), None):
                await broken
            if self.num_faults() > next_kill:
                next_kill += num_faults // 12
                self.faults["store killed"] += 1
                await self.store.kill()
                await self.store.start()
            if time.monotonic() - began > 10 * (told + 1):
                told += 1
                show(
                    f"{time.monotonic() - began:4.0f} s  {self.num_faults()} faults, {self.num_blocks_read} blocks read, {dict(self.ended)}"
                )
        self._running = False
        await asyncio.gather(*workers)

    async def rest(self) -> dict[str, int]:
        """What is still held when everybody has let go, in bytes, and what the store's books say."""
        client = await self._attach("auto")
        deadline = time.monotonic() + HANG_S
        while (stats := await client.stats()).num_bytes_leased and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for chain in range(NUM_CHAINS):
            await self._read(client, f"c{chain}", MAX_BLOCKS)
        stats = await client.stats()
        books = stats.num_bytes_leased + stats.num_bytes_cached + stats.num_bytes_free
        await client.close()
        return {
            "leaked_bytes": stats.num_bytes_leased + abs(books - stats.num_bytes_arena),
            "leases": stats.num_leases,
            "handoffs": stats.num_handoffs,
        }

    async def _attach(self, transport: str) -> StoreClient:
        while True:
            try:
                return await StoreClient.attach(self.address, client_id=transport, node_id=NODE, schema=SCHEMA, transport=transport)  # type: ignore[arg-type]
            except StoreUnavailable:
                await asyncio.sleep(0.05)  # it is being started again

    async def _work(self, transport: str) -> None:
        client = await self._attach(transport)
        while self._running:
            operation = self.random.choice((self._put, self._put, self._get, self._get, self._hand_off))
            outcome = await self._guarded(client, operation)
            self.ended[outcome] += 1
            if client.lost.is_set() or self.random.random() < 0.02:
                self.faults["session dropped"] += not client.lost.is_set()
                await client.close()
                client = await self._attach(transport)
        await client.close()

    async def _guarded(self, client: StoreClient, operation: Callable[[StoreClient], Awaitable[None]]) -> str:
        """An operation, perhaps with a fault in its middle. Its outcome's name."""
        task = asyncio.ensure_future(operation(client))
        if self.random.random() < 0.6:
            await asyncio.wait({task}, timeout=self.random.random() ** 2 * 0.1)
            self._hurt(client, task)
        await asyncio.wait({task}, timeout=HANG_S)
        if not task.done():
            self.num_hangs += 1
            show(f"HANG in {operation}: {task.get_stack()}")
            task.cancel()
            return "hang"
        if task.cancelled():
            return "cancelled"
        error = task.exception()
        if error is None:
            return "done"
        if isinstance(error, InvalidRequest):
            show(f"a request that ought to be right was refused: {error.message}")
        if isinstance(error, HalfmoonError):
            return error.code
        raise error

    def _hurt(self, client: StoreClient, task: asyncio.Future[None]) -> None:
        if task.done() or self.random.random() < 0.5:
            lanes = list(getattr(getattr(client._transport, "_lanes", None), "_open", ()))
            if lanes:
                self.faults["data connection broken"] += 1
                with contextlib.suppress(OSError):
                    self.random.choice(lanes).shutdown(socket.SHUT_RDWR)
                return
        if not task.done():
            self.faults["cancelled"] += 1
            task.cancel()

    async def _put(self, client: StoreClient) -> None:
        chain = f"c{self.random.randrange(NUM_CHAINS)}"
        writer = await client.cache(keys(chain, self.random.randint(1, MAX_BLOCKS)), self.random.choice((0.0, 1.0)))
        await self._push(writer, chain)

    async def _push(self, writer: BlockWriter, chain: str) -> None:
        blocks = np.stack([content(key) for key in keys(chain, writer.num_blocks)])
        try:
            if self.random.random() < 0.05:
                self.faults["writer gave up"] += 1
                raise WorkerLost("it wanted no more")
            layers = [np.ascontiguousarray(blocks[:, layer]) for layer in range(SCHEMA.num_layers)]
            await asyncio.to_thread(lambda: [writer.push(layer, 0, rows) for layer, rows in enumerate(layers)])
            await writer.seal(common_pb2.HandoffState(num_tokens=1))
        except HalfmoonError as error:
            await writer.abort(error)
            raise
        except asyncio.CancelledError:
            await asyncio.shield(writer.abort(WorkerLost("cancelled")))
            raise

    async def _get(self, client: StoreClient) -> None:
        await self._read(client, f"c{self.random.randrange(NUM_CHAINS)}", self.random.randint(1, MAX_BLOCKS))

    async def _read(self, client: StoreClient, chain: str, num_blocks: int) -> None:
        if self.random.random() < 0.1:  # as the proxy does, ahead of a fetch
            ahead = kvstore_pb2.PromoteRequest(block_keys=keys(chain, num_blocks))
            await client._connection.call(client._connection.stub.Promote, ahead)
        use = self.random.choice((common_pb2.SSD_USE_UNSPECIFIED, common_pb2.SSD_USE_LOAD, common_pb2.SSD_USE_LEAVE))
        reader = await client.fetch_prefix(keys(chain, num_blocks), ssd=use)
        await self._verify(reader, chain)

    async def _verify(self, reader: BlockReader, chain: str) -> None:
        found = np.zeros((reader.num_blocks, SCHEMA.num_layers, SCHEMA.layer_bytes), np.uint8)
        try:
            async for part in reader.slices():
                for index, block in enumerate(part.blocks):
                    found[part.first_block + index, part.layer : part.layer + part.num_layers] = block.reshape(part.num_layers, -1)
                if self.random.random() < 0.02:
                    self.faults["slow reader"] += 1
                    await asyncio.sleep(0.1)
        finally:
            await asyncio.shield(reader.release())
        self.num_blocks_read += reader.num_blocks
        for key, block in zip(keys(chain, reader.num_blocks), found, strict=True):
            if not np.array_equal(block, content(key)):
                self.num_wrong += 1
                show(f"WRONG bytes under {key.hex()}")

    async def _hand_off(self, client: StoreClient) -> None:
        """Written and fetched at the same time, now and then by nobody or until a deadline that is too near."""
        self._num_handoffs += 1
        name, chain = f"h{self._num_handoffs}-{secrets.token_hex(4)}", f"c{self.random.randrange(NUM_CHAINS)}"
        num_blocks, deadline_s = self.random.randint(1, MAX_BLOCKS), 5.0
        if self.random.random() < 0.1:
            self.faults["deadline too near"] += 1
            deadline_s = 0.005
        fetching = asyncio.ensure_future(self._fetch(client, name, chain, deadline_s))
        try:
            writer = await client.reserve(name, 1, keys(chain, num_blocks), num_blocks, deadline_s)
            await self._push(writer, chain)
            await fetching
        finally:
            fetching.cancel()
            await asyncio.wait({fetching})
            if not fetching.cancelled():
                fetching.exception()

    async def _fetch(self, client: StoreClient, name: str, chain: str, deadline_s: float) -> None:
        await self._verify(await client.fetch(name, 1, deadline_s), chain)


async def soak(num_faults: int, seed: int, out: Path | None) -> bool:
    show(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        run = Soak(seed, folder)
        began = time.monotonic()
        await run.run(num_faults)
        rest = await run.rest()
        run.faults["disk"] = run.store.num_disk_faults()
        run.store.close()
    figures: dict[str, Any] = {
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "faults": dict(run.faults),
        "num_faults": run.faults.total(),
        "outcomes": dict(run.ended),
        "blocks_read": run.num_blocks_read,
        "hangs": run.num_hangs,
        "wrong_blocks": run.num_wrong,
        **rest,
    }
    show(json.dumps(figures, indent=1))
    if out:
        out.write_text(json.dumps(figures, indent=1))
    return not (run.num_hangs or run.num_wrong or rest["leaked_bytes"] or rest["leases"] or rest["handoffs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", nargs=3)
    options = parser.parse_args()
    if options.role:
        asyncio.run(run_store(int(options.role[0]), options.role[1], int(options.role[2])))
        return
    if not asyncio.run(soak(options.faults, options.seed or secrets.randbelow(2**31), options.out)):
        raise SystemExit("the store did not come to rest, hung, or gave out wrong bytes")


if __name__ == "__main__":
    main()
