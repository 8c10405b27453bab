"""One request that can't be computed, beside others that can: it ends alone and says why, the others' tokens are transformers'."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest

from halfmoon.engine.executor import DeviceLost
from halfmoon.protocol.errors import HalfmoonError, InternalError, InvalidRequest, NonFiniteLogits, SequenceFailed, WorkerLost
from halfmoon.protocol.grpc_errors import from_rpc_error

Greedy = Callable[[list[int], int], list[int]]

POISON = 159  # a token whose embedding is NaN, or that breaks the step that holds it
NUM_TOKENS = 12


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, POISON), k=num_tokens)


async def error_of(call: Any) -> HalfmoonError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return from_rpc_error(failure.value, "worker")


def put_nan(cluster: Any) -> None:
    for view in (cluster.prefill, cluster.decode):
        view.engine._decoder.weights.embed[POISON] = math.nan


def failing(view: Any, *, after_layer: int | None = None) -> list[int]:
    """Steps that hold POISON in a prompt raise, after so many layers. Returns how many chunks each step had."""
    forward, sizes = view.engine.forward, []

    def fails(chunks: Any, **hooks: Any) -> Any:
        sizes.append(len(chunks))
        poisoned = any(POISON in chunk.sequence.token_ids for chunk in chunks)
        hook = hooks.get("after_layer")
        if poisoned and (after_layer is None or hook is None):
            raise RuntimeError("the kernel does not like it")

        def after(layer: int) -> None:
            hook(layer)
            if poisoned and layer == after_layer:
                raise RuntimeError("the kernel does not like it")

        return forward(chunks, **(hooks if hook is None else {**hooks, "after_layer": after}))

    view.engine.forward = fails
    return sizes


@pytest.fixture
def among(greedy: Greedy) -> Callable[..., Any]:
    """among(cluster, poisoned calls) -> their errors, once the neighbours' answers were found right."""

    async def run(cluster: Any, *poisoned: Any, num_neighbours: int = 4) -> list[HalfmoonError]:
        prompts = [prompt(9 + 7 * index, index) for index in range(num_neighbours)]
        calls = [(cluster.run, cluster.run_local)[index % 2](token_ids, max_tokens=NUM_TOKENS) for index, token_ids in enumerate(prompts)]
        answers, errors = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*(error_of(call) for call in poisoned)))
        for token_ids, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == greedy(token_ids, NUM_TOKENS)
        again = await cluster.run(prompt(15), max_tokens=5)
        assert again.token_ids == greedy(prompt(15), 5), "the workers live"
        await cluster.at_rest()
        return list(errors)

    return run


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.0, "top_p": 0.5, "top_k": 7, "min_p": 0.1},
    {"temperature": 0.0, "num_logprobs": 5},
    {"temperature": 1.0, "repetition_penalty": 0.01, "presence_penalty": 2.0, "logit_bias": {5: -100.0}, "num_logprobs": 0},
]


async def test_logits_that_are_no_numbers_end_their_request_alone_whatever_the_sampling(make_cluster: Any, among: Any) -> None:
    cluster = await make_cluster()
    put_nan(cluster)
    poisoned = [
        run([*prompt(6 + index), POISON, *prompt(3)], max_tokens=NUM_TOKENS, **sampling)
        for index, sampling in enumerate(SAMPLINGS)
        for run in (cluster.run, cluster.run_local)
    ]
    errors = await among(cluster, *poisoned)
    assert {type(error) for error in errors} == {NonFiniteLogits} and {error.fields["token"] for error in errors} == {1}
    for view, half in ((cluster.prefill, "prefill"), (cluster.decode, "decode")):
        labels = {"role": half, "reason": "non_finite_logits"}
        assert view.metrics.registry.get_sample_value("halfmoon_sequences_failed_total", labels) == len(SAMPLINGS)
        assert view.engine.cache.data.isfinite().all(), "who gets these pages next meets numbers"


@pytest.mark.parametrize("sampling", [{"logit_bias": {POISON: 100.0}}, {"logit_bias": {POISON: 100.0}, "temperature": 1.0, "seed": 1}])
async def test_logits_that_are_no_numbers_in_decode_end_the_answer_behind_its_last_sound_token(
    make_cluster: Any, among: Any, sampling: dict[str, Any]
) -> None:
    cluster = await make_cluster()
    put_nan(cluster)
    answer = cluster.answer()
    sequence = cluster.sequence(prompt(20), max_tokens=NUM_TOKENS, **sampling)
    decode = cluster.start_decode(sequence)
    prefill = cluster.start_prefill(sequence)
    (error,) = await among(cluster, cluster.read(decode, answer))
    assert (await prefill).state.first_token.token_id == POISON
    assert isinstance(error, NonFiniteLogits) and error.fields["token"] == 2 and answer.token_ids == [POISON]


async def test_a_request_that_rules_out_every_token_is_told_so(make_cluster: Any, among: Any) -> None:
    cluster = await make_cluster()
    banned = {"min_tokens": 2, "stop_token_ids": tuple(range(160)), "max_tokens": 5}
    poisoned = [run(prompt(8), **banned, **sampling) for sampling in SAMPLINGS for run in (cluster.run, cluster.run_local)]
    for error in await among(cluster, *poisoned):
        assert isinstance(error, InvalidRequest) and error.fields["param"] == "min_tokens"


@pytest.mark.parametrize("after_layer", [None, 0, 2])
async def test_a_step_that_breaks_fails_the_sequence_that_broke_it_and_the_hand_offs_of_the_others_are_whole(
    make_cluster: Any, among: Any, after_layer: int | None
) -> None:
    cluster = await make_cluster(prefill={"max_tokens_per_step": 256})
    for view in (cluster.prefill, cluster.decode):
        failing(view, after_layer=after_layer)
    poisoned = [cluster.run([*prompt(10), POISON]), cluster.run_local([POISON, *prompt(11)]), cluster.run([POISON])]
    for error in await among(cluster, *poisoned, num_neighbours=6):
        assert isinstance(error, SequenceFailed) and "does not like it" in error.message


async def test_a_suspect_is_computed_apart(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    sizes = failing(cluster.decode)
    sequence = cluster.sequence(prompt(20), max_tokens=NUM_TOKENS, suspect=True)
    calls = [cluster.run_local(prompt(21 + index), max_tokens=NUM_TOKENS) for index in range(3)]
    suspect = cluster.read(cluster.start_decode(sequence, local=True), cluster.answer())
    answers = await asyncio.gather(suspect, *calls)
    assert [answer.token_ids for answer in answers] == [greedy(prompt(20 + index), NUM_TOKENS) for index in range(4)]
    assert sizes.count(1) >= NUM_TOKENS and max(sizes) <= 3


async def test_a_lost_device_ends_the_worker_and_names_who_was_computed(make_cluster: Any) -> None:
    cluster = await make_cluster()
    await cluster.decode.life.joined.wait()
    computed, waiting = cluster.sequence(prompt(20), max_tokens=200), cluster.sequence(prompt(21))
    calls = [cluster.start_decode(computed, local=True), cluster.start_decode(waiting)]

    def lost(*_: Any) -> None:
        raise DeviceLost("the context is gone")

    cluster.decode.worker.executor.run = lost
    errors = [await error_of(cluster.read(call, cluster.answer())) for call in calls]
    assert all(isinstance(error, WorkerLost) and "the context is gone" in error.message for error in errors)
    assert [error.fields["in_step"] for error in errors] == [True, False]
    with pytest.raises(DeviceLost):
        await cluster.decode.serve_until_stopped()
    assert list(cluster.members.broken["decode-0"].request_ids) == [computed.request_id]
    late = await error_of(cluster.read(cluster.start_decode(cluster.sequence(prompt(22))), cluster.answer()))
    assert isinstance(late, WorkerLost) and not late.fields["in_step"]


async def test_a_worker_that_can_compute_nothing_ends(make_cluster: Any) -> None:
    cluster = await make_cluster()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("nothing works")

    cluster.decode.engine.forward = broken
    found = [await error_of(cluster.run_local(prompt(10 + index))) for index in range(8)]
    assert [type(error) for error in found] == [SequenceFailed] * 7 + [WorkerLost]


async def test_a_token_that_the_cluster_drew_is_not_the_clients_fault(make_cluster: Any) -> None:
    cluster = await make_cluster()
    for start in (cluster.start_prefill, cluster.start_decode):
        call = start(cluster.sequence([*prompt(8), 160], num_prompt_tokens=8))
        error = await error_of(call if start == cluster.start_prefill else cluster.read(call, cluster.answer()))
        assert isinstance(error, InternalError) and "drew token 160" in error.message
