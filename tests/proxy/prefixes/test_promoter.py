"""Which reads from SSD a store is asked for beside the workers' own."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from halfmoon.protocol.v1 import kvstore_pb2
from halfmoon.proxy.conductor.placement import MemberState, Placement, PlacementRequest, SsdVerdict
from halfmoon.proxy.prefixes.promoter import PROBE_BLOCKS, PROBE_S, Promoter

KEYS = [bytes([number]) * 16 for number in range(40)]
LOADED, COMPUTED = SsdVerdict(30, load_s=0.1, compute_s=1.0), SsdVerdict(30, load_s=1.0, compute_s=0.1)
DECODE = MemberState("decode-0", "d0.1", "store-9")


class Stage:
    """A store that notes what it is asked for, and a learner that notes what it is told."""

    def __init__(self) -> None:
        self.asked: list[list[bytes]] = []
        self.learnt: list[tuple[str, int, float]] = []
        self.now_s = 0.0
        self.error: grpc.aio.AioRpcError | None = None
        cluster: Any = SimpleNamespace(store_at=lambda address: self if address == "s" else None, schema=SimpleNamespace(block_bytes=100))
        self.store = self.learner = self
        self.title = "the store"
        self.promoter = Promoter(cluster, self, CollectorRegistry(), clock=lambda: self.now_s)

    async def Promote(self, request: kvstore_pb2.PromoteRequest, timeout: float) -> kvstore_pb2.PromoteReply:
        self.asked.append(list(request.block_keys))
        if self.error is not None:
            raise self.error
        return kvstore_pb2.PromoteReply(num_blocks=3, wait_s=0.25)

    def read_from_ssd(self, store: str, num_bytes: int, seconds: float) -> None:
        self.learnt.append((store, num_bytes, seconds))

    async def place(self, verdict: SsdVerdict, num_held: int, *, store: str = "s", num_outstanding: int = 0, capacity: int = 0) -> None:
        prefill = MemberState("prefill-0", "p0.1", "s", num_outstanding_tokens=num_outstanding, kv_capacity_tokens=capacity)
        placement = Placement(prefill, DECODE, None, 0, "", ssd_verdicts={store: verdict})
        self.promoter.placed(PlacementRequest(200, {store: num_held} if num_held else {}), placement, KEYS)
        await asyncio.gather(*self.promoter._tasks._tasks)


async def test_a_load_that_would_have_to_wait_for_pages_begins_at_once() -> None:
    stage = Stage()
    await stage.place(LOADED, 35)
    await stage.place(LOADED, 35, num_outstanding=800, capacity=1000)
    assert not stage.asked, "the worker begins it itself"
    await stage.place(LOADED, 35, num_outstanding=801, capacity=1000)
    assert stage.asked == [KEYS[:35]] and stage.learnt == [("s", 300, 0.25)]
    await stage.promoter.close()


async def test_a_slow_disk_is_asked_for_a_few_blocks_now_and_then() -> None:
    stage = Stage()
    await stage.place(COMPUTED, 5)
    assert stage.asked == [KEYS[: 5 + PROBE_BLOCKS]] and stage.learnt == [("s", 300, 0.25)]
    stage.now_s = PROBE_S - 0.1
    await stage.place(COMPUTED, 5, num_outstanding=10**6, capacity=1000)
    await stage.place(COMPUTED, 0, store="gone")
    assert len(stage.asked) == 1
    stage.now_s = PROBE_S
    await stage.place(SsdVerdict(2, 1.0, 0.1), 0)
    assert stage.asked[1:] == [KEYS[:2]]
    await stage.promoter.close()


async def test_a_store_that_can_not_is_left_in_peace(caplog: pytest.LogCaptureFixture) -> None:
    stage, nothing = Stage(), grpc.aio.Metadata()
    stage.error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, details="gone")
    await stage.place(COMPUTED, 5)
    assert not stage.learnt and "reading ahead from SSD failed" in caplog.text
    await stage.promoter.close()
