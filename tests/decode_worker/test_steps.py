"""Steps launched ahead, end to end on loopback: an engine that launches on the CPU, against transformers' greedy generate."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest

from halfmoon.engine.engine import Engine
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.errors import NonFiniteLogits
from halfmoon.protocol.grpc_errors import from_rpc_error
from halfmoon.protocol.v1 import common_pb2

Greedy = Callable[[list[int], int], list[int]]


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


class Launched:
    def __init__(self, launcher: Launcher, token_ids: list[int]) -> None:
        self._launcher = launcher
        self._token_ids = token_ids

    def tokens(self) -> list[int]:
        self._launcher.num_unread -= 1
        self._launcher.reading()
        return self._token_ids


class Launcher:
    """Engine.launch where there is no device to wait for: the step is computed at once, from tokens that the host is not told yet.

    Nothing else may touch the pages of a step before it is read: what was launched may run until then.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.num_unread = self.num_launched = self.num_ahead = self.num_refused = self.num_chunks_ahead = 0
        self.reading: Callable[[], object] = lambda: None  # called when a step is read, before its tokens are there
        self._last: dict[Sequence, int] = {}
        self._compute = engine.forward

    def launch(self, chunks: list[StepChunk], *, after_layer: Callable[[int], None] | None = None) -> Launched | None:
        sampled = [one for one in chunks if one.start + one.num_tokens >= one.sequence.num_tokens]
        if any(one.sequence.sampling.needs_penalties for one in sampled):
            self.num_refused += self.num_unread
            return None
        shadows = {one.sequence: self._with_all_tokens(one) for one in chunks}
        logits = self._compute([StepChunk(shadows[one.sequence], one.start, one.num_tokens) for one in chunks], after_layer=after_layer)
        token_ids = (
            [sample.token_id for sample in self.engine.sample(logits, [shadows[one.sequence] for one in sampled])] if sampled else []
        )
        self._last = {chunk.sequence: token for chunk, token in zip(sampled, token_ids, strict=True)}
        self.num_launched += 1
        self.num_ahead += self.num_unread > 0
        self.num_chunks_ahead += self.num_unread > 0 and any(one.num_tokens > 1 for one in chunks)
        self.num_unread += 1
        assert self.num_unread <= 2
        return Launched(self, token_ids)

    def forward(self, chunks: list[StepChunk], **hooks: Any) -> Any:
        assert self.num_unread == 0, "a step in turn comes when all before it are read"
        return self._compute(chunks, **hooks)

    def _with_all_tokens(self, chunk: StepChunk) -> Sequence:
        sequence = chunk.sequence
        tokens = [*sequence.token_ids, *([self._last[sequence]] if chunk.start == sequence.num_tokens else [])]
        return Sequence("shadow", tokens, sequence.num_prompt_tokens, sequence.sampling, pages=sequence.pages)


@pytest.fixture
async def launching(make_cluster: Any) -> Callable[..., Any]:
    """launching(**make_cluster's) -> (cluster, the launcher of its decode worker's engine)."""

    async def make(**settings: Any) -> tuple[Any, Launcher]:
        cluster = await make_cluster(**settings)
        launcher = Launcher(cluster.decode.engine)
        cluster.decode.engine.launch, cluster.decode.engine.forward = launcher.launch, launcher.forward
        return cluster, launcher

    return make


async def test_a_single_answer_comes_from_steps_each_launched_behind_another(launching: Any, greedy: Greedy) -> None:
    cluster, launcher = await launching()
    answer = await cluster.run(prompt(30), max_tokens=20)
    assert answer.token_ids == greedy(prompt(30), 20)
    await cluster.at_rest()
    assert (launcher.num_launched, launcher.num_ahead) == (19, 18), "the first token came with the hand-off; its end was foreseen"


async def test_many_requests_at_once_each_get_their_own_tokens(launching: Any, greedy: Greedy) -> None:
    """Prompts with and without a hand-off, and penalties that can't be launched."""
    cluster, launcher = await launching(decode={"max_running": 6, "max_prefill_tokens_per_step": 16})
    prompts = [prompt(5 + 9 * index, index) for index in range(14)]
    runs = [cluster.run_local if index % 3 == 0 else cluster.run for index in range(14)]
    calls = [run(token_ids, max_tokens=10 + 2 * index) for index, (run, token_ids) in enumerate(zip(runs, prompts, strict=True))]
    penalised = [cluster.run(prompt(20, seed), max_tokens=6, presence_penalty=0.5) for seed in range(3)]
    answers = await asyncio.gather(*calls, *penalised)
    for index, token_ids in enumerate(prompts):
        assert answers[index].token_ids == greedy(token_ids, 10 + 2 * index)
        assert answers[index].finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert launcher.num_ahead > 0 and launcher.num_chunks_ahead > 0
    await cluster.at_rest()


async def test_a_step_ahead_that_can_not_be_launched_comes_in_turn(launching: Any, greedy: Greedy) -> None:
    cluster, launcher = await launching()
    joined = threading.Event()

    def wait_for_the_other() -> None:
        if launcher.num_launched == 5:
            assert joined.wait(60)

    launcher.reading = wait_for_the_other
    running = asyncio.create_task(cluster.run(prompt(30), max_tokens=40))
    while launcher.num_launched < 5:
        await asyncio.sleep(0.001)
    other = asyncio.create_task(cluster.run(prompt(20), max_tokens=6, presence_penalty=0.5))
    while cluster.decode.scheduler.num_running < 2:
        await asyncio.sleep(0.001)
    joined.set()
    assert (await running).token_ids == greedy(prompt(30), 40)
    assert len((await other).token_ids) == 6 and launcher.num_refused == 1
    await cluster.at_rest()


async def test_an_end_that_nobody_foresaw_throws_the_token_behind_it_away(launching: Any, greedy: Greedy) -> None:
    cluster, launcher = await launching()
    tokens = greedy(prompt(12), 20)
    answer = await cluster.run(prompt(12), max_tokens=20, stop_token_ids=(tokens[7],))
    length = tokens.index(tokens[7]) + 1
    assert answer.token_ids == tokens[:length]
    assert answer.finished.reason == common_pb2.FINISH_REASON_STOP
    await cluster.at_rest()
    assert launcher.num_launched == length, "one for each token but the hand-off's, and one for nothing"
    turn = [*prompt(12), *answer.token_ids, 5, 6, 7]
    assert (await cluster.run(turn, max_tokens=5)).token_ids == greedy(turn, 5), "the blocks that were cached are the answer's"


async def test_preempted_sequences_give_the_same_tokens(launching: Any, greedy: Greedy) -> None:
    cluster, launcher = await launching(decode={"kv_capacity_tokens": 160, "max_prefill_tokens_per_step": 24})
    prompts = [prompt(30 + index, index) for index in range(4)]
    answers = await asyncio.gather(*(cluster.run(token_ids, max_tokens=60) for token_ids in prompts))
    for token_ids, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == greedy(token_ids, 60)
    assert sum(answer.finished.phases.num_preemptions for answer in answers) > 0 and launcher.num_ahead > 0
    await cluster.at_rest()


async def test_a_cancelled_request_frees_its_pages_once_no_step_writes_to_them(launching: Any, greedy: Greedy) -> None:
    cluster, _ = await launching()
    staying = asyncio.create_task(cluster.run(prompt(30), max_tokens=150))
    sequence = cluster.sequence(prompt(40), max_tokens=150)
    call = cluster.start_decode(sequence)
    await cluster.start_prefill(sequence)
    while cluster.decode.scheduler.num_running < 2:
        await asyncio.sleep(0.001)
    call.cancel()
    assert (await staying).token_ids == greedy(prompt(30), 150)
    await cluster.at_rest()


async def test_a_row_without_a_token_ends_its_sequence_and_the_step_behind_it_harms_nobody(launching: Any, greedy: Greedy) -> None:
    """That step is under way when the host reads of it, and looks up a token that is none."""
    cluster, launcher = await launching()
    poison = 159
    cluster.decode.engine._decoder.weights.embed[poison] = math.nan
    answer = cluster.answer()
    sequence = cluster.sequence(prompt(20), max_tokens=50, logit_bias={poison: 100.0})
    prompts = [[token for token in prompt(15 + index) if token != poison] for index in range(3)]
    neighbours = asyncio.gather(*(cluster.run(token_ids, max_tokens=30) for token_ids in prompts))
    decode = cluster.start_decode(sequence)
    await cluster.start_prefill(sequence)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.read(decode, answer)
    assert isinstance(from_rpc_error(caught.value, "worker"), NonFiniteLogits) and answer.token_ids == [poison]
    assert [one.token_ids for one in await neighbours] == [greedy(token_ids, 30) for token_ids in prompts]
    assert launcher.num_ahead > 0
    await cluster.at_rest()
    assert cluster.decode.engine.cache.data.isfinite().all()


async def test_a_launch_that_breaks_is_computed_in_turn(launching: Any, greedy: Greedy) -> None:
    cluster, launcher = await launching()
    launch, num_broken = launcher.launch, 0

    def breaks(chunks: Any, **hooks: Any) -> Any:
        nonlocal num_broken
        if len(chunks) == 2:
            num_broken += 1
            raise RuntimeError("no graph likes it")
        return launch(chunks, **hooks)

    cluster.decode.engine.launch = breaks
    answers = await asyncio.gather(*(cluster.run(prompt(20 + index), max_tokens=20) for index in range(3)))
    assert [answer.token_ids for answer in answers] == [greedy(prompt(20 + index), 20) for index in range(3)]
    assert num_broken > 0
    await cluster.at_rest()


async def test_a_step_launched_behind_another_is_timed_from_the_end_of_that(launching: Any) -> None:
    """No second is counted twice."""
    cluster, launcher = await launching()
    note, spans = cluster.decode.half._samples.note, []

    def seen(chunks: list[StepChunk], began: float, ended: float) -> None:
        spans.append((began, ended))
        note(chunks, began, ended)

    cluster.decode.half._samples.note = seen
    await cluster.run(prompt(30), max_tokens=20)
    assert launcher.num_ahead == 18 and len(spans) == 19
    assert all(earlier[1] == later[0] < later[1] for earlier, later in itertools.pairwise(spans))


async def test_steps_that_are_stopped_read_what_they_launched_and_launch_no_more(launching: Any) -> None:
    cluster, launcher = await launching()
    stopping = threading.Event()
    launcher.reading = lambda: launcher.num_launched < 5 or stopping.wait(60)
    running = asyncio.create_task(cluster.run(prompt(30), max_tokens=200))
    while launcher.num_launched < 5:
        await asyncio.sleep(0.001)
    stopped = asyncio.create_task(asyncio.to_thread(cluster.decode.worker.steps.stop))
    while not cluster.decode.worker.steps._stopping:
        await asyncio.sleep(0.001)
    stopping.set()
    await stopped
    assert (launcher.num_launched, launcher.num_unread) == (5, 0)
    assert cluster.decode.scheduler.num_running == 1
    await cluster.decode.stop(0.0)
    with pytest.raises(grpc.aio.AioRpcError):
        await running
