"""Cached prefixes on the virtual clock: what a node holds is pinned, what another holds more is fetched, what was computed is cached.

placed ─hope─► prefill starts ─load─► … ─look_again─► first chunk … last chunk ─cached─► in the node's cache and in the index
The index knows of a node what was placed there at once, as the live proxy's does; when the prefill has ended it is put right.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..proxy.conductor.predictors.timing import OWN_LINK, Predictors
from ..proxy.prefixes.index import PrefixIndex
from .clock import EventLoop
from .counters import Counters
from .instance import Instance
from .job import Job
from .links import send
from .scenario import Scenario
from .trace import TraceRequest


class Prefixes:
    """by_name: every instance; filled in later."""

    def __init__(self, scenario: Scenario, loop: EventLoop, index: PrefixIndex, predictors: Predictors, counters: Counters) -> None:
        self.by_name: dict[str, Instance] = {}
        self._scenario = scenario
        self._loop = loop
        self._index = index
        self._predictors = predictors
        self._counters = counters

    def keys(self, request: TraceRequest) -> list[bytes]:
        """Only full blocks are shared; the trailing partial one has no key."""
        return [block.to_bytes(8, "big") for block in request.block_ids[: request.num_input_tokens // self._scenario.block_size]]

    def usable(self, job: Job) -> int:
        """Blocks that spare work: the last token is always computed."""
        return min(len(job.keys), (job.num_tokens - 1) // self._scenario.block_size)

    def warm(self, requests: Sequence[TraceRequest]) -> None:
        """The caches as these requests left them, sessions spread over the nodes that prefill."""
        nodes = [instance for instance in self.by_name.values() if instance.role != "decode"]
        for request in requests:
            session = max(request.block_ids[:2])  # the second where there is one: the first may be everybody's
            nodes[session % len(nodes)].cache.insert(self.keys(request))

    def hope(self, node: Instance, job: Job) -> None:
        """Counts what was placed as cached: it will be by the time that a request behind it starts."""
        self._index.change(node.node, job.keys, ())

    def load(self, job: Job) -> tuple[int, float]:
        """Pins what the node holds, fetches what another holds more. Cached tokens, and when they are there."""
        node = self.by_name[job.prefill_on]
        keys = job.keys[: self.usable(job)]
        run = job.run = node.cache.acquire(keys, from_ssd=node.node not in job.left_on_ssd)
        num_own = len(run.slots) + run.num_ssd
        num_blocks, ready_s = num_own, self._loop.now
        block_bytes = self._scenario.block_size * self._scenario.cost.kv_bytes_per_token
        if run.num_ssd:
            ready_s += self._read_ssd(node, run.num_ssd * block_bytes)
        num_own, loaded_s = self._from_own(node, keys, num_own, block_bytes)
        num_blocks, ready_s = max(num_blocks, num_own), max(ready_s, self._loop.now + loaded_s)
        holder = self.by_name.get(job.fetch_from)
        if holder is not None and not holder.down:
            num_other, num_ssd = self._held(holder, keys, holder.node not in job.left_on_ssd)
            if num_other > num_own:
                num_blocks = num_other
                read_s = self._read_ssd(holder, min(num_ssd, num_other - num_own) * block_bytes) if num_ssd else 0.0
                ready_s = max(ready_s, self._fetch(holder, node, (num_other - num_own) * block_bytes) + read_s)
        return num_blocks * self._scenario.block_size, ready_s

    def _read_ssd(self, node: Instance, num_bytes: int) -> float:
        """Seconds."""
        seconds = num_bytes / self._scenario.cost.ssd_bytes_per_s
        self._counters.ssd_bytes += num_bytes
        if self._scenario.learn:
            self._predictors.ssd.observe(num_bytes, seconds, node.node)
        return seconds

    def _from_own(self, node: Instance, keys: list[bytes], num_stored: int, block_bytes: int) -> tuple[int, float]:
        """Blocks in the node's store or the instance's pages, and the seconds that a load of those not in pages takes."""
        rate = self._scenario.cost.own_load_bytes_per_s
        if not rate:
            return num_stored, 0.0
        num_pages = node.pages.num_leading(keys)
        num_bytes = max(num_stored - num_pages, 0) * block_bytes
        if num_bytes and self._scenario.learn:
            self._predictors.transfer.observe(num_bytes, num_bytes / rate, OWN_LINK)
        return max(num_stored, num_pages), num_bytes / rate

    def in_pages(self, job: Job) -> dict[str, int]:
        """Instance -> leading blocks of the prompt in its pages, where loads from the own store take time."""
        if not self._scenario.cost.own_load_bytes_per_s or not job.keys:
            return {}
        found = ((name, one.pages.num_leading(job.keys)) for name, one in self.by_name.items() if not one.down)
        return {name: num for name, num in found if num}

    def keep_pages(self, node: Instance, job: Job) -> None:
        """The job has ended on the instance, or its prefill has."""
        if self._scenario.cost.own_load_bytes_per_s:  # nobody asks for them else
            node.pages.keep(job.keys)

    def _held(self, holder: Instance, keys: list[bytes], from_ssd: bool) -> tuple[int, int]:
        """Leading blocks, and those of them on SSD alone. They count as used."""
        run = holder.cache.acquire(keys, from_ssd=from_ssd)
        holder.cache.release(run)
        return len(run.slots) + run.num_ssd, run.num_ssd

    def _fetch(self, holder: Instance, node: Instance, num_bytes: int) -> float:
        now = self._loop.now
        self._counters.prefix_bytes += num_bytes
        arrived_s = send(holder.egress, node.ingress, num_bytes, now, now)
        if self._scenario.learn:
            self._predictors.transfer.observe(num_bytes, arrived_s - now)
        return arrived_s

    def look_again(self, job: Job) -> int:
        """Cached tokens of a prefill that has not begun: who was before it may have left more here."""
        node = self.by_name[job.prefill_on]
        assert job.run is not None
        num_slots = len(job.run.slots)
        usable = self.usable(job)
        if num_slots == usable or node.cache.dram.slot(job.keys[num_slots]) is None:
            return job.num_cached_tokens
        run = node.cache.acquire(job.keys[:usable])
        node.cache.release(job.run)
        job.run = run
        return max(job.num_cached_tokens, len(run.slots) * self._scenario.block_size)

    def cached(self, node: Instance, job: Job) -> None:
        """The prefill is done: its blocks stand on the node, as far as they fit."""
        self.unpin(node, job)
        node.cache.insert(job.keys)
        self.keep_pages(node, job)
        self.heal(node, job)

    def unpin(self, node: Instance, job: Job) -> None:
        if job.run is not None:
            node.cache.release(job.run)
            job.run = None

    def heal(self, node: Instance, job: Job) -> None:
        """The index knows of the node's cache what was hoped for at the placement; now what is so."""
        absent = [key for key in job.keys if node.cache.dram.slot(key) is None and node.cache.ssd.slot(key) is None]
        if absent:
            self._index.change(node.node, (), absent)

    def lose(self, node: Instance) -> None:
        """The node is dead, with all it held."""
        self._index.drop(node.node)
        node.cache.clear()
