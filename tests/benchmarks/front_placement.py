"""Of front.py: what placing costs the proxy's event loop as the cluster grows. Milliseconds of the thread's own time, unless said.

placement        from token ids to an assigned pair, hot prefixes' replication included        replication   of that, planning the copies
learning         share of a core that workers' step samples take                            choices       n answers to one long prompt

Workers and stores are members of a real Router whose addresses take connections and never answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.config import ProxyConfig
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.members.cluster import Cluster
from halfmoon.proxy.members.member import Member
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.prefixes.replicator import Replicator
from halfmoon.proxy.prefixes.watch import PrefixWatch
from halfmoon.proxy.request import ProxyRequest
from halfmoon.proxy.requests.decisions import RequestDecision
from halfmoon.proxy.requests.router import Router

BLOCK_SIZE = 64
NUM_TOKENS = 2048  # of a prompt
NUM_SHARED_TOKENS = 1024  # of those, everybody's: hot
NUM_PLACEMENTS = 300
PAIRS = (("cache_aware", "none"), ("kvcache_centric", "ttft_tbt"), ("kvcache_centric", "predictive"), ("adaptive", "predictive"))
SCHEMA = KVSchema(model_fingerprint="bench", dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=8, block_size=BLOCK_SIZE)
ROLES = {"prefill": control_pb2.ROLE_PREFILL, "decode": control_pb2.ROLE_DECODE, "store": control_pb2.ROLE_STORE}


async def _forever(*_: object) -> None:
    await asyncio.Event().wait()


def _address(number: int, port: int) -> str:
    return f"127.{1 + number // 65536}.{number // 256 % 256}.{number % 256}:{port}"


@contextlib.asynccontextmanager
async def cluster(num_prefill: int, num_decode: int, **config: Any) -> AsyncIterator[Router]:
    """Every worker with a store of its own, all joined and once reported. Stores are not watched, and copies never end."""
    with socket.create_server(("0.0.0.0", 0), backlog=4096) as mute, contextlib.ExitStack() as patched:
        port = mute.getsockname()[1]
        for owner, name, stand_in in ((PrefixWatch, "_joined", lambda *_: None), (Replicator, "_copy", _forever)):
            patched.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        metrics = ProxyMetrics(CollectorRegistry())
        members = Cluster(metrics)
        router = Router(ProxyConfig(**{"max_queued_requests": 10**6, "max_queued_tokens": 10**9, **config}), members, metrics,
                        eos_token_ids=frozenset({2}))  # fmt: skip
        rng = random.Random(0)
        for number in range(num_prefill + num_decode):
            role = "prefill" if number < num_prefill else "decode"
            _join(members, "store", number, port)
            worker = _join(members, role, number, port)
            members.report(worker, control_pb2.MemberLoad(num_outstanding_tokens=rng.randint(0, 20_000)))
        yield router
        await router.close()
        await members.close()


def _join(members: Cluster, role: str, number: int, port: int) -> Member:
    address = _address(number, port)
    info = control_pb2.MemberInfo(
        id=f"{role}-{number:05}", incarnation=f"{role}.{number}", role=ROLES[role], node_id=f"node-{number}", store_address=address,
        address=address, max_model_len=200_000, kv_capacity_tokens=1_000_000, schema=None if role == "store" else SCHEMA.to_proto(),
    )  # fmt: skip
    return members.join(info, control_pb2.MemberLoad())


def _request(number: int, rng: random.Random, shared: list[int]) -> ProxyRequest:
    token_ids = shared + [rng.randrange(32_000) for _ in range(NUM_TOKENS - len(shared))]
    return ProxyRequest(f"r{number}", token_ids, SamplingParams(max_tokens=16, seed=1), 600.0)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{share}": round(ordered[min(len(ordered) * share // 100, len(ordered) - 1)] * 1e3, 3) for share in (50, 99)}


async def placement(size: int, policy: str, admission: str, num_queued: int = 0) -> dict[str, Any]:
    """size: of prefill workers, and of decode workers. num_queued: requests placed before, half of them decoding."""
    slo = {} if admission == "none" else {"ttft_slo_s": 1e6, "tpot_slo_s": 1e3}
    async with cluster(size, size, policy=policy, admission=admission, replicate="hot", **slo) as router:
        rng = random.Random(1)
        shared = [rng.randrange(32_000) for _ in range(NUM_SHARED_TOKENS)]
        keys, index = block_keys(root_key(SCHEMA.fingerprint), shared, BLOCK_SIZE), router._index
        for member in list(router.cluster.members.values()):
            if member.role == "prefill":
                index.change(member.store_address, keys, ())
        if router.conductor.admission is not None and admission == "predictive":
            for _ in range(500):
                router.conductor.admission.observe_decode(rng.uniform(1.0, 30.0), NUM_TOKENS)
        for number in range(num_queued):
            pair = _assign(router, _request(number, rng, shared))
            if number % 2:
                pair.begin_decode()
        spent: list[float] = []
        for number in range(NUM_PLACEMENTS):
            request = _request(num_queued + number, rng, shared)
            begun = time.thread_time()
            pair = _assign(router, request)
            spent.append(time.thread_time() - begun)
            if number % 2:
                pair.begin_decode()
            pair.release()
        await asyncio.sleep(0)
        return {"size": size, "policy": policy, "admission": admission, "num_queued": num_queued, **_percentiles(spent)}


def _assign(router: Router, request: ProxyRequest) -> Any:
    """As Router.open does, without starting it."""
    with contextlib.ExitStack() as undo:
        decisions: list[RequestDecision] = []
        router._reserve([request], decisions, undo)
        prompt = router._prompts.encode(request.token_ids)
        return router._dispatcher.place(request, prompt, decisions[0])


async def replication(size: int) -> dict[str, Any]:
    """Planning the copies of a prefix that half of the stores hold."""
    async with cluster(size, size, replicate="hot") as router:
        rng = random.Random(1)
        keys = [rng.randbytes(16) for _ in range(NUM_SHARED_TOKENS // BLOCK_SIZE)]
        index, replicator = router._index, router._replicator
        prefill = [member for member in router.cluster.members.values() if member.role == "prefill"]
        for member in prefill[::2]:
            index.change(member.store_address, keys, ())
        for _ in range(16 * size):  # so hot that every store should hold it
            replicator._prefixes.hit(keys, 1, time.monotonic())
        spent: list[float] = []
        for _ in range(NUM_PLACEMENTS):
            begun = time.thread_time()
            replicator.placed(keys)
            spent.append(time.thread_time() - begun)
        await asyncio.sleep(0)
        return {"size": size, **_percentiles(spent)}


async def learning(size: int, reports_per_s: float = 5.0, num_samples: int = 10, seconds: float = 2.0) -> dict[str, Any]:
    """Share of a core that the reports of so many decode workers take, whatever the hour: the learner is given the clock."""
    async with cluster(1, size) as router:
        rng, now_s = random.Random(1), 1000.0
        router.learner._clock = lambda: now_s
        router.learner._refilled_s = now_s
        workers = [member for member in router.cluster.members.values() if member.role == "decode"]
        step = router.predictors.step
        loads: list[control_pb2.MemberLoad] = []
        for _ in workers:
            samples = [(rng.randint(1, 64), rng.randint(1000, 200_000)) for _ in range(num_samples)]
            loads.append(
                control_pb2.MemberLoad(
                    num_outstanding_tokens=5000,
                    steps=[
                        control_pb2.StepSample(num_sequences=num, num_kv_tokens=tokens, seconds=step.predict(num, tokens) * 1.5)
                        for num, tokens in samples
                    ],
                )
            )
        num_reports = round(size * reports_per_s * seconds)
        begun = time.thread_time()
        for number in range(num_reports):
            now_s += 1.0 / (size * reports_per_s)
            router.cluster.report(workers[number % size], loads[number % size])
        return {"size": size, "cpu_share": round((time.thread_time() - begun) / seconds, 4)}


async def choices(n: int = 128, num_tokens: int = 16_384) -> dict[str, Any]:
    """Placing and starting n answers to one prompt: in all, and the longest work during which the loop served nobody else."""
    async with cluster(4, 4) as router:
        rng = random.Random(1)
        token_ids = [rng.randrange(32_000) for _ in range(num_tokens)]
        requests = [ProxyRequest(f"c-{at}", token_ids, SamplingParams(max_tokens=16, seed=at + 1), 600.0) for at in range(n)]
        ticks = [time.thread_time()]

        async def tick() -> None:
            while True:
                await asyncio.sleep(0)
                ticks.append(time.thread_time())

        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        begun = time.thread_time()
        streams = await router.open_all(requests)
        while any(not member.context.num_requests for member in router.cluster.members.values() if member.role == "decode"):
            await asyncio.sleep(0)
        for _ in range(5):  # what starts them has run
            await asyncio.sleep(0)
        ended = time.thread_time()
        ticking.cancel()
        seen = [moment for moment in ticks if moment >= begun] + [ended]
        gap_s = max(after - before for before, after in zip([begun, *seen], seen, strict=False))
        for stream in streams:
            await stream.cancel("measured")
        total_ms, longest_ms = round((ended - begun) * 1e3, 1), round(gap_s * 1e3, 1)
        return {"n": n, "num_tokens": num_tokens, "total_ms": total_ms, "longest_gap_ms": longest_ms}


async def measure(sizes: Sequence[int], show: Callable[[str], None] = lambda _: None) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {"placement": [], "replication": [], "learning": [], "choices": []}

    async def row(name: str, found: Awaitable[dict[str, Any]]) -> None:
        rows[name].append(await found)
        show(f"{name:12} {json.dumps(rows[name][-1])}")

    for size in sizes:
        for policy, admission in PAIRS:
            await row("placement", placement(size, policy, admission))
        await row("placement", placement(size, "adaptive", "predictive", num_queued=2 * size))
        await row("replication", replication(size))
        await row("learning", learning(size))
    await row("choices", choices())
    await row("choices", choices(16, 131_072))
    return rows
