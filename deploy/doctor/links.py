"""Measured bandwidth of every link from here to a store, by every transport that reaches.

reserve ─► push random bytes ─► the same bytes fetched as they come ─► abort: nothing of it is ever cached or decoded
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...kvstore.client import StoreClient
from ...kvstore.transport import TransportChoice, TransportName
from ...protocol.credentials import Credentials
from ...protocol.errors import HalfmoonError, RequestCancelled
from ...protocol.memory import human_bytes
from ...protocol.schema import KVSchema
from ...protocol.tasks import beside
from ...protocol.v1 import control_pb2
from ..checks.finding import Finding, ok
from .here import is_here

SIZES = (2**20, 32 * 2**20)  # bytes that a measurement moves there, and back; the second where the first was too quick to be judged
ARENA_SHARE = 8  # it takes at most this part of an arena
TIMEOUT_S = 10.0
MIN_JUDGED_S = 0.1  # what takes less says more about calls than about the link, and holds nobody back
SLOW_BYTES_PER_S: dict[TransportName, float] = {"shm": 200e6, "tcp": 100e6, "grpc": 20e6}
"""Below these a link holds back hand-offs: 1 GbE carries 118e6, and one core of a quiet machine copies and parses more than the others."""


@dataclass(frozen=True, slots=True)
class Link:
    store_id: str
    transport: TransportName
    num_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_per_s": self.bytes_per_s}


async def measure_links(members: Sequence[control_pb2.StatusReply.Member], credentials: Credentials) -> tuple[list[Link], list[Finding]]:
    """Of all stores, one after another: two at a time would share what they measure."""
    schema = next((KVSchema.from_proto(one.info.schema) for one in members if one.info.HasField("schema")), None)
    links: list[Link] = []
    findings: list[Finding] = []
    for store in (one.info for one in members if one.info.role == control_pb2.ROLE_STORE):
        if schema is None:
            break
        choices: tuple[TransportChoice, ...] = ("auto", "tcp", "grpc") if is_here(store.address) else ("tcp", "grpc")
        for choice in choices:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    link = await measure(store, schema, choice, credentials)
            except HalfmoonError as error:
                name = "schema" if error.code == "schema_mismatch" else "store"
                findings.append(Finding(name, "fault", f"{store.id} at {store.address}: {error.message}", code=error.code))
                break
            except TimeoutError:
                what = f"the link to {store.id} by {choice} is slow: {human_bytes(SIZES[-1])} at most did not pass in {TIMEOUT_S:g} s"
                findings.append(Finding("link", "slow", what, _advice(store)))
                break  # a slower transport would only hold up what else passes there
            if all((one.store_id, one.transport) != (link.store_id, link.transport) for one in links):
                links.append(link)
                findings.append(judge(link, store, schema))
    return links, findings


async def measure(store: control_pb2.MemberInfo, schema: KVSchema, transport: TransportChoice, credentials: Credentials) -> Link:
    """Raises SchemaMismatch, StoreUnavailable, StoreFull."""
    client = await StoreClient.attach(
        store.address,
        client_id="halfmoon doctor",
        node_id=store.node_id,
        schema=schema,
        transport=transport,
        timeout_s=TIMEOUT_S,
        credentials=credentials,
    )
    try:
        num_slots = store.kv_capacity_tokens // schema.block_size
        num_blocks, seconds = 0, 0.0
        for size in SIZES:
            if seconds < MIN_JUDGED_S:
                num_blocks = max(1, min(size // schema.block_bytes, num_slots // ARENA_SHARE))
                seconds = await _move(client, schema, num_blocks)
        return Link(store.id, client.transport, num_blocks * schema.block_bytes, seconds)
    finally:
        await client.close()


async def _move(client: StoreClient, schema: KVSchema, num_blocks: int) -> float:
    """Seconds until all that was pushed has come back."""
    name = f"doctor-{secrets.token_hex(8)}"
    keys = [secrets.token_bytes(16) for _ in range(num_blocks)]  # nobody's
    blocks = np.frombuffer(secrets.token_bytes(num_blocks * schema.layer_bytes), np.uint8).reshape(num_blocks, schema.layer_bytes)
    writer = await client.reserve(name, 1, keys, num_blocks, TIMEOUT_S)
    try:
        reader = await client.fetch(name, 1, TIMEOUT_S)

        def push() -> None:
            for layer in range(schema.num_layers):
                writer.push(layer, 0, blocks)

        started = time.perf_counter()
        slices: Any = reader.slices()
        async with beside(asyncio.to_thread(push)) as pushing:
            while reader.num_bytes < num_blocks * schema.block_bytes:
                await anext(slices)
            seconds = time.perf_counter() - started
            await pushing
        await slices.aclose()
        await reader.release()
        return seconds
    finally:
        await writer.abort(RequestCancelled("halfmoon doctor has measured the link"))


def judge(link: Link, store: control_pb2.MemberInfo, schema: KVSchema) -> Finding:
    prompt_s = 1000 / schema.block_size * schema.block_bytes / link.bytes_per_s
    speed = f"{human_bytes(link.bytes_per_s)}/s"
    told = f"{link.store_id} by {link.transport}: {speed}, {prompt_s:.3f} s for the KV of 1,000 tokens"
    if link.seconds < MIN_JUDGED_S or link.bytes_per_s >= SLOW_BYTES_PER_S[link.transport]:
        return ok("link", told)
    return Finding("link", "slow", f"the link to {told}: that is slow for {link.transport}", _advice(store))


def _advice(store: control_pb2.MemberInfo) -> str:
    host = store.address.rpartition(":")[0]
    return f"look at the network to {host} (`iperf3`, `ethtool`, `tc qdisc`), and at what else its machine does"
