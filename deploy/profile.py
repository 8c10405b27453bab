"""Measures a running cluster through its proxy and makes a cost model of it.

warm up ─► prefills alone ─► behind cached prefixes ─► decode batches ─► all workers at once ─► Timeline ─► fit ─► CostModel
                                                                         (where they share cores)
Every prompt has random tokens, so that no cache holds anything but the intended prefixes. Each part has its share of the time and
repeats its cases until that is over. Cases that would take longer than the rest of it are left out.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..client import AsyncClient, Control, Delta
from ..protocol.errors import Overloaded, WorkerLost
from ..protocol.tasks import Tasks
from ..proxy.conductor.predictors.cost_model import CostModel
from .profile_fit import Facts, Points, fit
from .profile_target import Target, look
from .profile_timeline import Sample, Timeline

MAX_NEW = 2048  # tokens that a worker computes in one step by default; a longer prompt would take several
LEAST_NEW = 16
MAX_PREFIX = 16384
NUM_STEPS = 24  # steps with the whole batch
TAIL = 32  # tokens at the end of a decode stream's prompt that no other has
MAX_STAGGER = 400  # more steps that a batch's first stream may wait for the last one
NUM_BESIDE = 3  # prefills in a row beside the same streams
SHARES = (0.15, 0.3, 0.6)  # shares of the time at which prefills, prefixes and batches end; the rest is for all workers at once
SHARES_APART = (0.25, 0.5, 1.0)  # if each worker has a device of its own

Case = TypeVar("Case")
Progress = Callable[[float, str], None]  # (share of the time that is over, what is being measured)


@dataclass(frozen=True, slots=True)
class Profile:
    model: CostModel
    points: Points
    facts: Facts
    num_requests: int
    seconds: float


async def profile(
    address: str,
    control: Control,
    api_key: str = "",
    authority: bytes | None = None,
    *,
    seconds: float = 45.0,
    seed: int | None = None,
    progress: Progress = lambda share, what: None,
) -> Profile:
    """Measures for about the given seconds. seed: of the prompts; use a new one each time, because the cluster caches prompts.

    Raises Unavailable or one of its subclasses if nobody answers, Overloaded if others use the cluster, ConfigError for a cluster
    or a time with which no cost model can be measured.
    """
    begun = time.monotonic()
    async with AsyncClient(address, api_key=api_key, authority=authority, control=control) as client:
        target = await look(client, control)
        ended = sum((await client.status()).outcomes.values())
        run = Profiler(client, target, seconds, random.Random(seed), progress)
        await run.measure()
        num_others = sum((await client.status()).outcomes.values()) - ended - run.num_requests
        if num_others > 0:
            raise Overloaded(f"{num_others} requests of others ran during the profile, which blurs it; profile a cluster that is idle")
    timeline = Timeline(run.samples, target.node_of)
    points = Points(timeline.prefill_points(MAX_NEW), timeline.step_points(), timeline.request_points())
    return Profile(fit(points, target.facts), points, target.facts, run.num_requests, time.monotonic() - begun)


class Profiler:
    """One run, which fills samples."""

    def __init__(self, client: AsyncClient, target: Target, seconds: float, rng: random.Random, progress: Progress) -> None:
        self.samples: list[Sample] = []
        self.num_requests = 0  # including requests that are not samples
        self._client = client
        self._target = target
        self._rng = rng
        self._progress = progress
        self._begun = time.monotonic()
        self._seconds = seconds
        self._until = 0.0  # share of the time at which the present part ends
        self._room = target.max_model_len - 1
        self._token_s = self._step_s = 0.0  # of a prompt's token and of a step: rough values, to know what fits into the time
        self._stored: list[int] = []  # a prompt whose blocks are in the store

    async def measure(self) -> None:
        await self._warm_up()
        parts = [(self._prefills(), "prefill"), (self._prefixes(), "prefill behind cached prefixes"), (self._batches(), "decode")]
        shares = SHARES if self._target.facts.shares_cores else SHARES_APART
        for (cases, what), self._until in zip(parts, shares, strict=False):
            for requests in cases:
                self._report(what)
                self.samples += await asyncio.gather(*(self._one(prompt, num_tokens) for prompt, num_tokens in requests))
        if self._target.facts.shares_cores:
            self._until = 1.0
            await self._everybody()

    # the parts: each yields requests to send together, as (prompt, max_tokens), until its time is over

    def _prefills(self) -> Iterator[list[tuple[list[int], int]]]:
        longest = min(MAX_NEW, self._room)
        lengths = sorted(longest // 2**halvings for halvings in range(8) if longest // 2**halvings >= LEAST_NEW)
        for length in self._repeat(lengths, lambda length: length * self._token_s, least=4):
            yield [(self._tokens(length), 1)]

    def _prefixes(self) -> Iterator[list[tuple[list[int], int]]]:
        block_size = self._target.block_size
        fits = int(self._left_s / 3 / self._token_s)
        num_blocks = min(self._room * 3 // 4, MAX_PREFIX, fits) // block_size
        num_blocks = max(num_blocks, 1)
        self._stored = self._tokens(num_blocks * block_size)
        yield [([*self._stored, *self._tokens(1)], 1)]
        rest = self._room - len(self._stored)
        prefixes = sorted({max(num_blocks // part, 1) * block_size for part in (1, 2, 4)})
        cases = [(prefix, new) for new in (min(64, rest), min(512, rest)) for prefix in prefixes]
        for prefix, new in self._repeat(cases, lambda case: 2 * case[1] * self._token_s, least=2):
            yield [(self._stored[:prefix] + self._tokens(new), 1)]

    def _batches(self) -> Iterator[list[tuple[list[int], int]]]:
        """Contexts are cached prefixes with a tail: the time goes into decode steps, which cost the same whoever computed the KV."""
        block_size = self._target.block_size
        lengths = sorted({0, *(len(self._stored) * part // 3 // block_size * block_size for part in (1, 2))})
        sizes = [(size, length) for size in (4, 1, 16, 2, 8, 32, 64) for length in lengths if self._holds(size, length)]
        cases = [(1, 0), *((size * self._target.num_decode, length) for size, length in sizes)]
        for num_streams, length in self._repeat(cases, lambda case: self._batch_s(case[0]), least=2):
            num_tokens = min(self._num_tokens(num_streams), self._room - length - TAIL)
            yield [([*self._stored[:length], *self._tokens(TAIL)], num_tokens) for _ in range(num_streams)]

    async def _everybody(self) -> None:
        """Prefills on one worker and on all of them, alone and beside decode streams that began earlier."""
        target = self._target
        length = max(min(512, self._room, int(0.2 / self._token_s)), LEAST_NEW)
        prefill_s = 2 * length * self._token_s
        short = min(self._target.block_size, self._room // 2)
        num_tokens = min(int(NUM_BESIDE * prefill_s / self._step_s), self._room - short)
        every, decode = target.num_prefill, target.num_decode
        cases = [(every, decode), (1, decode), (every, 0), (every, 2 * decode), (1, 2 * decode)]
        for num_prefills, num_streams in self._repeat(cases, lambda case: 2 * NUM_BESIDE * prefill_s, least=1):
            self._report("all workers at once")
            begun = [asyncio.Event() for _ in range(num_streams)]
            tasks = Tasks("the profile")
            streams = [tasks.start(self._one(self._tokens(short), num_tokens, event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            for _ in range(NUM_BESIDE):
                self.samples += await asyncio.gather(*(self._one(self._tokens(length), 1) for _ in range(num_prefills)))
            self.samples += await asyncio.gather(*streams)

    # time

    @property
    def _left_s(self) -> float:
        """Seconds left for the present part."""
        return self._until * self._seconds - (time.monotonic() - self._begun)

    def _repeat(self, cases: Sequence[Case], cost_s: Callable[[Case], float], least: int) -> Iterator[Case]:
        """Yields the first `least` cases in any event, then all that fit, again and again until none does."""
        yield from cases[:least]
        fitting = list(cases)
        while fitting:
            fitting = []
            for case in cases:
                if cost_s(case) < self._left_s:
                    fitting.append(case)
                    yield case

    def _holds(self, size: int, length: int) -> bool:
        return size * (length + NUM_STEPS + self._target.block_size) <= self._target.facts.kv_capacity_tokens

    def _num_tokens(self, num_streams: int) -> int:
        """Answer tokens needed so that the first stream still runs when the last begins, and for NUM_STEPS after that."""
        return NUM_STEPS + min(int(self._stagger_s(num_streams) / self._step_s), MAX_STAGGER)

    def _stagger_s(self, num_streams: int) -> float:
        """Time between the first stream's first token and the last one's. A short prefill is taken to cost four times its tokens."""
        return 4 * num_streams * TAIL * self._token_s / self._target.num_prefill

    def _batch_s(self, num_streams: int) -> float:
        slow = max(num_streams / self._target.num_decode / 4, 1.0)  # roughly how much slower a large batch's step is
        return self._stagger_s(num_streams) + self._num_tokens(num_streams) * self._step_s * slow

    # requests

    async def _warm_up(self) -> None:
        """The first requests pay for what is made once. Two more show how fast the cluster is."""
        length = min(256, self._room // 2)
        for _ in range(2):
            await asyncio.gather(*(self._one(self._tokens(length), 4) for _ in range(self._target.num_prefill + self._target.num_decode)))
        found = await self._one(self._tokens(length), min(16, self._room - length))
        self._token_s, self._step_s = found.phases.prefill_s / length, max(found.phases.tpot_s, 1e-4)

    def _report(self, what: str) -> None:
        self._progress(min((time.monotonic() - self._begun) / self._seconds, 1.0), what)

    async def _one(self, prompt: list[int], num_tokens: int, begun: asyncio.Event | None = None) -> Sample:
        """begun: set at the first token, or at the end of a request without tokens."""
        self.num_requests += 1
        sent, moments = time.perf_counter(), []
        stream = self._client.stream(token_ids=prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        try:
            async for event in stream:
                if isinstance(event, Delta) and event.token_ids:
                    moments += [time.perf_counter()] * len(event.token_ids)
                    if begun is not None:
                        begun.set()
            completion = await stream.completion()
        finally:
            if begun is not None:
                begun.set()
        if completion.phases.num_attempts > 1:
            raise WorkerLost("a worker failed during the profile; profile a cluster whose workers stay up", worker="")
        usage, kv_bytes = completion.usage, self._target.facts.kv_bytes_per_token
        loaded = usage.num_cached_tokens * kv_bytes
        return Sample(sent, tuple(moments), usage.num_prompt_tokens, usage.num_cached_tokens, loaded, completion.phases)

    def _tokens(self, num: int) -> list[int]:
        return [self._rng.randrange(self._target.vocab_size) for _ in range(num)]
