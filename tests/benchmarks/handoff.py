"""The hand-off of one prompt's KV through a store's arena: each leg alone, and layer by layer under a prefill.

    halfmoon bench handoff [--out FILE] [--runs 5] [--device cpu --shape small]

pages ─► arena ─► pages      8,192 tokens of Llama-3.1-8B's shape in bf16 are 1 GiB: 128 blocks of 64 tokens, 32 layers, 256 KiB a slice
    push: the device's copies, checksums, the seal        load: the device's copies, checksums, verified
The store is a process, the decode side another (on the second GPU where there is one); this one is the prefill side. The bytes in the
decode side's pages are compared with those in ours first; nothing is timed where they differ. Rates beside those of pinned buffers.
Overlapped: the engine prefills the prompt with random weights, each layer's blocks leave as in a prefill worker. Exposed is what the
prefill takes longer than without, and what passes from its end (the first token is sampled) until the decode side could admit it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import xxhash
from shapes import write_shape

from halfmoon.engine.engine import Engine
from halfmoon.engine.kv_cache import PagedKVCache
from halfmoon.engine.page_copy import cache_pages, load_pages
from halfmoon.engine.page_transfer import LocalPageTransfer
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.transfer import TransferThread
from halfmoon.kvstore import checksums
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.prefill_worker.job import PrefillJob
from halfmoon.prefill_worker.pusher import finished_blocks
from halfmoon.protocol.blocks import KEY_BYTES
from halfmoon.protocol.config import ModelOptions, StoreConfig
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, worker_pb2

NODE = "bench"
NUM_TOKENS = {"llama-3.1-8b": 8192, "small": 512}
DEADLINE_S = 60.0


class Side:
    """One worker's end: pages, a transfer thread, a session at the store with its arena pinned."""

    def __init__(self, cache: PagedKVCache, name: str) -> None:
        self.cache = cache
        self.device = cache.data.device
        self.pages = LocalPageTransfer(cache, TransferThread(name, self.device, self._crashed))
        self._name = name

    async def attach(self, address: str) -> None:
        self.client = await StoreClient.attach(address, client_id=self._name, node_id=NODE, schema=self.cache.schema)
        if self.client.arena is not None:
            await asyncio.to_thread(self.pages.pin, self.client.arena)

    async def load(self, name: str, pages: list[int]) -> None:
        """As a decode worker takes a hand-off in: returns when the pages hold it and every checksum matched."""
        reader = await self.client.fetch(name, 1, DEADLINE_S)
        await load_pages(self.pages, pages, reader)
        self.loaded_at = time.monotonic()
        await reader.release()

    def digests(self, pages: list[int]) -> list[str]:
        """Of each layer's bytes."""
        return [xxhash.xxh3_128_hexdigest(self.cache.read_bytes(layer, pages)) for layer in range(self.cache.schema.num_layers)]

    async def close(self) -> None:
        await self.client.close()
        await asyncio.to_thread(self.pages.close)

    def _crashed(self, error: BaseException) -> None:
        measure.show(f"{self._name}: {type(error).__name__}: {error}")
        os._exit(1)


class Child:
    """This file in a process of its own: a JSON line each way for every order."""

    def __init__(self, role: str, device: str, **environment: str) -> None:
        paths = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **environment}
        command = [sys.executable, str(Path(__file__).resolve()), "--role", role, "--device", device]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process of the benchmark ended early; its message stands above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


async def orders() -> AsyncIterator[Any]:
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield json.loads(line)


def reply(**answer: Any) -> None:
    measure.show(json.dumps(answer))


async def run_store() -> None:
    server = None
    async for order in orders():
        server = StoreServer(StoreConfig(arena_bytes=order["arena_bytes"], lease_ttl_s=30.0), node_id=NODE)
        reply(address=await server.start("127.0.0.1"))
    if server is not None:
        await server.stop(0)


async def run_decode(device: torch.device) -> None:
    """First order: address, schema, num_pages. Then one a hand-off: name, pages; answered when its fetch begins and when it stands."""
    side: Side | None = None
    async for order in orders():
        if side is None:
            side = Side(PagedKVCache(KVSchema(**order["schema"]), order["num_pages"], device), "decode-0")
            await side.attach(order["address"])
            reply(transport=side.client.transport)
            continue
        loading = asyncio.create_task(side.load(order["name"], order["pages"]))
        await asyncio.sleep(0)
        reply(fetching=True)
        await loading
        reply(loaded_at=side.loaded_at, digests=side.digests(order["pages"]) if order["compare"] else [])
    if side is not None:
        await side.close()


def random_keys(num_blocks: int) -> list[bytes]:
    return [secrets.token_bytes(KEY_BYTES) for _ in range(num_blocks)]


def gb_s(num_bytes: int, seconds: float) -> float:
    return num_bytes / seconds / 1e9


def pinned_rates(num_bytes: int, device: torch.device) -> dict[str, float]:
    """GB/s of one copy of num_bytes between torch's own pinned memory and the device; on a CPU of a plain copy."""
    on_cuda = device.type == "cuda"
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_cuda)
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    rates: dict[str, float] = {}
    for name, target, source in (("d2h", host, there), ("h2d", there, host)):
        times = [seconds(lambda target=target, source=source: target.copy_(source, non_blocking=True), device) for _ in range(6)]
        rates[name] = gb_s(num_bytes, statistics.median(times[1:]))
    measure.show(f"pinned copies of {num_bytes / 2**30:.2f} GiB: D2H {rates['d2h']:.1f} GB/s, H2D {rates['h2d']:.1f} GB/s")
    return rates


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def hashing_s(side: Side, num_blocks: int) -> float:
    """Of as many bytes in the arena, layer by layer, on as many threads as a lease's."""
    arena, schema = side.client.arena, side.cache.schema
    assert arena is not None
    hashes = checksums.Checksums(num_blocks, schema.layer_bytes)
    began = time.perf_counter()
    for layer in range(schema.num_layers):
        hashes.add(0, arena.rows(range(num_blocks), layer))
    hashes.wait()
    return time.perf_counter() - began


@contextmanager
def unhashed() -> Iterator[None]:
    """Every checksum is that of nothing, on both sides: what the legs take without."""
    update, checksums._update = checksums._update, lambda hashes, rows: None
    try:
        yield
    finally:
        checksums._update = update


async def measure_legs(side: Side, pages: list[int], others: list[int], rates: dict[str, float], runs: int) -> list[dict[str, Any]]:
    """Pages to the arena, sealed; the arena to other pages, verified. Nothing else runs."""
    schema, rows = side.cache.schema, []
    num_bytes = len(pages) * schema.block_bytes

    async def once() -> tuple[float, float, int]:
        name = secrets.token_hex(4)
        writer = await side.client.reserve(name, 1, random_keys(len(pages)), len(pages), DEADLINE_S)
        num_copies = len(writer.rows(0, 0, len(pages)).runs)
        writer.dropped()
        began = time.monotonic()
        await cache_pages(side.pages, pages, writer)
        sealed = time.monotonic()
        await side.load(name, others)
        return sealed - began, side.loaded_at - sealed, num_copies

    for label, context in (("", None), (" without checksums", unhashed)):
        found = []
        for _ in range(runs + 1):
            if context is None:
                found.append(await once())
            else:
                with context():
                    found.append(await once())
        for index, (leg, rate) in enumerate((("push", rates["d2h"]), ("load", rates["h2d"]))):
            taken = statistics.median(run[index] for run in found[1:])
            row = {"leg": leg + label, "ms": taken * 1e3, "gb_s": gb_s(num_bytes, taken), "of_pinned": gb_s(num_bytes, taken) / rate}
            rows.append({**row, "all_ms": [run[index] * 1e3 for run in found[1:]], "copies_a_layer": found[-1][2]})
            share = f"{row['gb_s']:6.1f} GB/s, {row['of_pinned']:.3f} of the pinned copy"
            measure.show(f"{leg + label:26s} {row['ms']:8.2f} ms  {share}, {found[-1][2]} copies a layer")
    taken = statistics.median(hashing_s(side, len(pages)) for _ in range(runs))
    rows.append({"leg": "checksums alone", "ms": taken * 1e3, "gb_s": gb_s(num_bytes, taken), "lanes": len(checksums.lanes())})
    measure.show(f"{'checksums alone':26s} {taken * 1e3:8.2f} ms  {gb_s(num_bytes, taken):6.1f} GB/s on {len(checksums.lanes())} threads")
    return rows


class Prefill:
    """The prefill worker's work for one prompt: the engine's step on a thread, the layers' blocks on the transfer thread."""

    def __init__(self, engine: Engine, side: Side, sequence: Sequence) -> None:
        self._engine = engine
        self._side = side
        self._sequence = sequence

    def step(self, push: Callable[[int], None] | None = None) -> common_pb2.TokenOutput:
        """Sets seconds and ended_at: everything up to the sampled token."""
        chunk = StepChunk(self._sequence, 0, self._sequence.num_tokens)
        synchronize(self._engine.device)
        began = time.monotonic()
        logits = self._engine.forward([chunk], after_layer=push)
        (sample,) = self._engine.sample(logits, [self._sequence])
        synchronize(self._engine.device)
        self.ended_at = time.monotonic()
        self.seconds = self.ended_at - began
        return common_pb2.TokenOutput(token_id=sample.token_id)

    async def hand_off(self, name: str) -> None:
        """Returns when it is sealed."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        num_blocks = len(self._sequence.pages)
        keys = random_keys(num_blocks)
        request = worker_pb2.PrefillRequest()
        started, computed, pushed = (loop.create_future() for _ in range(3))
        job: Any = PrefillJob(request, self._sequence, keys, task, started, computed, pushed)  # pyright: ignore[reportArgumentType]
        job.client, job.writer = self._side.client, await self._side.client.reserve(name, 1, keys, num_blocks, DEADLINE_S)
        pushes = [finished_blocks(job, StepChunk(self._sequence, 0, self._sequence.num_tokens), self._engine.page_size)]
        token = await asyncio.to_thread(self.step, self._side.pages.after_layer(pushes))
        self._side.pages.when_landed(job.tell_pushed)
        await job.pushed
        await job.writer.seal(common_pb2.HandoffState(num_tokens=self._sequence.num_tokens, first_token=token))
        self.sealed_at = time.monotonic()


async def measure_overlap(prefill: Prefill, decode: Child, pages: list[int], runs: int) -> dict[str, Any]:
    bare, found = [], []
    for run in range(runs + 1):
        await asyncio.to_thread(prefill.step)
        bare.append(prefill.seconds)
        name = f"overlapped-{run}"
        decode.tell(name=name, pages=pages, compare=False)
        decode.answer()
        await prefill.hand_off(name)
        loaded_at = (await asyncio.to_thread(decode.answer))["loaded_at"]
        found.append((prefill.seconds, prefill.sealed_at - prefill.ended_at, loaded_at - prefill.ended_at))
    bare_s = statistics.median(bare[1:])
    with_s, seal_s, tail_s = (statistics.median(column) for column in zip(*found[1:], strict=True))
    exposed_s = tail_s + max(with_s - bare_s, 0.0)
    measure.show(f"prefill {bare_s * 1e3:.2f} ms bare, {with_s * 1e3:.2f} ms with the hand-off under way")
    measure.show(f"from the first token: sealed after {seal_s * 1e3:.2f} ms, pages verified after {tail_s * 1e3:.2f} ms")
    measure.show(f"exposed {exposed_s * 1e3:.2f} ms, {exposed_s / (with_s + tail_s):.4f} of the time to the first token")
    return {
        "leg": "overlapped",
        "prefill_bare_ms": bare_s * 1e3,
        "prefill_ms": with_s * 1e3,
        "seal_ms": seal_s * 1e3,
        "tail_ms": tail_s * 1e3,
        "exposed_ms": exposed_s * 1e3,
        "exposed_share": exposed_s / (with_s + tail_s),
        "all_ms": [[value * 1e3 for value in run] for run in found[1:]],
        "bare_all_ms": [value * 1e3 for value in bare[1:]],
    }


async def compare(prefill: Prefill, side: Side, decode: Child, pages: list[int], others: list[int]) -> dict[str, Any]:
    """One hand-off whose bytes are compared on both sides."""
    decode.tell(name="compared", pages=others, compare=True)
    decode.answer()
    await prefill.hand_off("compared")
    theirs = (await asyncio.to_thread(decode.answer))["digests"]
    ok = theirs == side.digests(pages) and len(set(theirs)) == len(theirs)
    measure.show(f"bytes of {len(pages)} blocks, {len(theirs)} layers: {'the same on both sides' if ok else 'WRONG'}")
    return {"check": "pages on both sides", "ok": ok}


def load_engine(shape: str, device: str, num_tokens: int) -> Engine:
    folder = write_shape(shape, Path(tempfile.mkdtemp()))
    options = ModelOptions(path=str(folder), device=device, load_format="dummy", block_size=64)  # type: ignore[arg-type]
    return Engine.load(options, kv_capacity_tokens=num_tokens, num_threads=max(1, (os.cpu_count() or 2) // 2))


def second_gpu() -> dict[str, str]:
    """Where the decode side shall run."""
    if torch.cuda.device_count() < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[1]}


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    num_tokens = NUM_TOKENS[args.shape]
    engine = load_engine(args.shape, args.device, 2 * num_tokens)
    schema, num_blocks = engine.schema, num_tokens // engine.page_size
    shuffled = np.random.default_rng(0).permutation(2 * num_blocks).tolist()
    pages, others = shuffled[:num_blocks], shuffled[num_blocks:]
    tokens = np.random.default_rng(1).integers(0, engine.config.vocab_size, num_tokens).tolist()
    sequence = Sequence("bench", tokens, num_tokens, SamplingParams(temperature=0.0), pages=pages)
    num_bytes = num_blocks * schema.block_bytes
    store, decode = Child("store", "cpu"), Child("decode", args.device, **(second_gpu() if args.device == "cuda" else {}))
    side = Side(engine.cache, "prefill-0")
    try:
        store.tell(arena_bytes=args.arenas * num_bytes)
        address = store.answer()["address"]
        decode.tell(address=address, schema=dataclasses.asdict(schema), num_pages=2 * num_blocks)
        began = time.monotonic()
        await side.attach(address)
        rows: list[dict[str, Any]] = [{"attach_s": time.monotonic() - began, "transport": side.client.transport, "bytes": num_bytes}]
        measure.show(
            f"{num_bytes / 2**30:.3f} GiB a hand-off; attached and pinned in {rows[0]['attach_s']:.2f} s ({side.client.transport})"
        )
        if not {side.client.transport, decode.answer()["transport"]} == {"shm"}:
            raise SystemExit("the arena can't be mapped here; is /dev/shm large enough?")
        prefill = Prefill(engine, side, sequence)
        rows.append(await compare(prefill, side, decode, pages, others))
        if measure.all_right(rows):
            rows.append({"pinned": pinned_rates(num_bytes, engine.device)})
            rows += await measure_legs(side, pages, others, rows[-1]["pinned"], args.runs)
            rows.append({**await measure_overlap(prefill, decode, others, args.runs), "num_gpus": torch.cuda.device_count()})
        await side.close()
    finally:
        decode.close()
        store.close()
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", help="JSON file to write")
    options.add_argument("--runs", type=int, default=5, help="of which the median is taken")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the benchmark itself; figures mean nothing")
    options.add_argument("--shape", choices=sorted(NUM_TOKENS), default="llama-3.1-8b")
    options.add_argument("--arenas", type=int, default=3, help="the arena's size, in hand-offs")
    options.add_argument("--role", choices=("store", "decode"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.role == "store":
        asyncio.run(run_store())
        return
    if args.device == "cuda":
        measure.require_gpu("this benchmark")
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if args.role == "decode":
        asyncio.run(run_decode(device))
        return
    rows = asyncio.run(run(args))
    measure.write(args.out, rows)
    if not measure.all_right(rows):
        raise SystemExit("wrong results; nothing was timed")


if __name__ == "__main__":
    main()
