"""A prefix that stands on SSD alone: loaded while the disk is fast, computed while it is slow. Real workers, store and router; the disk's
time is a clock that only its reads move, so nothing waits and every load takes exactly what the disk says."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfmoon.kvstore.ssd_files import SsdFiles
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.proxy.prefixes.promoter import PROBE_S
from halfmoon.proxy.request import ProxyRequest
from halfmoon.proxy.requests.explanation import explain
from halfmoon.proxy.requests.learner import Learner
from halfmoon.tests.waiting import until

Greedy = Callable[[list[int], int], list[int]]
NUM_TOKENS, NUM_BLOCKS, BLOCK_SIZE = 200, 25, 8
BLOCK_BYTES = 3 * 2 * 2 * 12 * 4 * BLOCK_SIZE  # layers, K and V, heads, head_dim, fp32
FAST_S, SLOW_S = 1e-4, 0.1  # of a block; computing one takes 8 ms
MODEL = CostModel(
    per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=1e-3, per_sequence_s=0.0, per_kv_token_s=0.0,
    kv_bytes_per_token=1, kv_capacity_tokens=10_000, cache_tokens=10_000, link_bytes_per_s=1e12, ssd_bytes_per_s=BLOCK_BYTES / 1e-3,
)  # fmt: skip
"""Of the disk it has another idea than either."""


def prompt(seed: int) -> list[int]:
    return random.Random(f"ssd/{seed}").choices(range(3, 160), k=NUM_TOKENS)


class Disk:
    """Its reads take block_s each, one after another, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, block_s: float) -> None:
        self.block_s = block_s
        self.num_reads = 0
        self._now_s = 0.0
        self._lock = threading.Lock()
        read = SsdFiles.read

        def timed(files: SsdFiles, *arguments: Any) -> bool:
            with self._lock:
                self.num_reads += 1
                self._now_s += self.block_s
            return read(files, *arguments)

        monkeypatch.setattr(SsdFiles, "read", timed)

    def clock(self) -> float:
        return self._now_s


class Site:
    """Workers under a router, whose store has room for three prompts in DRAM."""

    def __init__(self, proxy: Any, cluster: Any, disk: Disk) -> None:
        self.proxy, self.cluster, self.disk = proxy, cluster, disk
        self.index = proxy.router._index
        self.tier = cluster.store._running().tiers._ssd
        self.tier._clock = disk.clock
        self._num_others = 0
        self._num_requests = 0

    def keys(self, token_ids: list[int]) -> list[bytes]:
        return block_keys(root_key(self.cluster.store._running().schema.fingerprint), token_ids, BLOCK_SIZE)

    async def ask(self, token_ids: list[int], num_tokens: int = 4) -> tuple[list[int], Any]:
        """The answer, and why it came about."""
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        name = f"r{self._num_requests}"
        events = [event async for event in self.proxy.router.open(ProxyRequest(name, token_ids, sampling, 7 * 24 * 3600.0))]
        decision = self.proxy.router.decisions.find(name)[0]
        await self.cluster.at_rest()
        return [token for event in events[:-1] for token in event.token_ids], explain(decision, "kvcache_centric", "none")

    async def cool(self, token_ids: list[int]) -> None:
        """Others' prompts come, until this one's blocks stand on SSD alone, and the proxy knows it."""
        keys = self.keys(token_ids)

        def on_ssd() -> int:
            return sum(self.tier.holds(key) and self.tier._dram.slot(key) is None for key in keys)

        while on_ssd() < NUM_BLOCKS:
            self._num_others += 1
            await self.ask(prompt(1000 + self._num_others), 1)
            await until(lambda: self.tier._demoting is None)
        address = self.cluster.store.address
        await until(lambda: self.index.ssd_runs(keys, self.index.leading_runs(keys)) == {address: NUM_BLOCKS})


@pytest.fixture(params=["one worker of both roles", "1P1D"])
async def site(request: Any, make_proxy: Any, make_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Of all that could be learnt, only what the SSD takes is."""
    for name in ("_note", "_note_link"):
        monkeypatch.setattr(Learner, name, lambda *_, **__: None)
    MODEL.save(tmp_path / "model.json")
    proxy = await make_proxy(policy="kvcache_centric", cost_model=str(tmp_path / "model.json"))
    disk = Disk(monkeypatch, FAST_S)
    ssd = {"ssd_path": str(tmp_path / "ssd"), "ssd_bytes": 4000 * 8192, "ssd_free_ratio": 0.5}
    cluster = await make_cluster(both=int(request.param != "1P1D"), arena_bytes=100 * BLOCK_BYTES, store=ssd, prefix_cache_hbm=False)
    proxy.know_store(cluster.store)
    for worker in cluster.workers:
        await worker.life.joined.wait()
    return Site(proxy, cluster, disk)


def ssd_of(explanation: Any) -> Any:
    return next((one for one in explanation.attempts[0].predictions if one.name == "ssd"), None)


async def test_a_prefix_on_ssd_is_loaded_where_that_beats_computing_and_computed_where_it_does_not(site: Site, greedy: Greedy) -> None:
    token_ids = prompt(1)
    expected = greedy(token_ids, 4)
    assert (await site.ask(token_ids))[0] == expected
    for _ in range(4):
        await site.cool(token_ids)
        answer, fast = await site.ask(token_ids)
        assert answer == expected and "25 blocks on SSD are loaded" in fast.attempts[0].reason
        assert fast.attempts[0].num_cached_tokens == NUM_TOKENS - BLOCK_SIZE, "the last token is computed, and its block with it"
    found = ssd_of(fast)
    assert found.measured_s == pytest.approx(NUM_BLOCKS * FAST_S)
    assert found.predicted_s == pytest.approx(found.measured_s, rel=0.2)

    site.disk.block_s, num_loaded = SLOW_S, 0
    while True:
        await site.cool(token_ids)
        num_reads = site.disk.num_reads
        answer, slow = await site.ask(token_ids)
        assert answer == expected
        if "25 blocks on SSD are computed" in slow.attempts[0].reason:
            break
        num_loaded += 1
        assert site.disk.num_reads == num_reads + NUM_BLOCKS and num_loaded <= 3, "one slow load may be a hiccup, three are not"
    assert slow.attempts[0].num_cached_tokens == 0 and slow.phases.ssd_wait_s == 0.0
    assert ssd_of(slow) is None


async def test_a_disk_that_is_fast_again_is_used_again(site: Site, greedy: Greedy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is asked for a few blocks now and then, beside the requests that compute theirs."""
    now_s = 0.0
    monkeypatch.setattr(site.proxy.router._promoter, "_clock", lambda: now_s)
    token_ids, address = prompt(1), site.cluster.store.address
    await site.ask(token_ids)
    for _ in range(4):
        site.proxy.router.learner.read_from_ssd(address, NUM_BLOCKS * BLOCK_BYTES, NUM_BLOCKS * SLOW_S)
    reasons: list[str] = []
    while not reasons or "are computed" in reasons[-1]:
        await site.cool(token_ids)
        now_s += PROBE_S
        answer, found = await site.ask(token_ids)
        assert answer == greedy(token_ids, 4)
        reasons.append(found.attempts[0].reason)
    assert "25 blocks on SSD are loaded" in reasons[-1] and len(reasons) > 3, "one fast read may be a hiccup, too"
    sample = site.proxy.router.metrics.registry.get_sample_value
    assert sample("halfmoon_ssd_promotions_total", {"cause": "probe"}) == len(reasons) - 1
    assert sample("halfmoon_ssd_prefixes_total", {"verdict": "leave"}) == len(reasons) - 1
