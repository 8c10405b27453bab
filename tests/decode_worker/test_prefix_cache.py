"""Prefixes in the workers' pages, end to end on loopback, against transformers' greedy generate."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from halfmoon.protocol.blocks import root_key

Greedy = Callable[[list[int], int], list[int]]

COUPLED, HANDED_OFF, BOTH = "coupled", "1P1D", "two of both roles"


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


def computed(engine: Any) -> list[tuple[str, int, int]]:
    """(request id, start, tokens) of every chunk that is computed from now on."""
    forward, found = engine.forward, []

    def recorded(chunks: Any, **hooks: Any) -> Any:
        found.extend((chunk.sequence.request_id, chunk.start, chunk.num_tokens) for chunk in chunks)
        return forward(chunks, **hooks)

    engine.forward = recorded
    return found


def hits(worker: Any, tier: str) -> float:
    return worker.metrics.registry.get_sample_value("halfmoon_prefix_cache_hits_total", {"tier": tier}) or 0.0


async def make(make_cluster: Any, form: str, **settings: Any) -> tuple[Any, Any]:
    """The cluster, and what runs a request in it."""
    cluster = await make_cluster(**settings, both=2 if form == BOTH else 0)
    return cluster, cluster.run_local if form == COUPLED else cluster.run


@pytest.mark.parametrize("form", [COUPLED, HANDED_OFF, BOTH])
async def test_a_second_turn_computes_its_new_tokens_alone_and_answers_the_same(
    make_cluster: Any, greedy: Greedy, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the answer's end. A worker that only prefilled finds the answer's full blocks in the store, which are cached by then."""
    monkeypatch.setattr("halfmoon.decode_worker.worker.CACHE_PATIENCE_S", 60.0)  # whatever else this machine does
    cluster, run = await make(make_cluster, form)
    opening = prompt(47)
    answer = await run(opening, max_tokens=20)
    assert answer.token_ids == greedy(opening, 20)
    turn = [*opening, *answer.token_ids, 5, 6, 7]
    computing = cluster.decode if form == COUPLED else cluster.prefill
    steps = computed(computing.engine)
    again = await run(turn, max_tokens=12)
    assert again.token_ids == greedy(turn, 12)
    prefilled = [(start, size) for name, start, size in steps if name == f"r{cluster.num_requests}" and start < len(turn)]
    # the KV of an answer's last token is never computed; what the same worker computed is found inside a block, too
    num_known = 66 if form == COUPLED else 64
    assert again.admitted.state.num_cached_tokens == num_known
    assert prefilled == [(num_known, len(turn) - num_known)]
    await cluster.at_rest()


@pytest.mark.parametrize("form", [COUPLED, HANDED_OFF, BOTH])
async def test_seeded_and_greedy_tokens_are_the_same_with_hits_and_without(make_cluster: Any, form: str) -> None:
    found: list[list[list[int]]] = []
    for prefix_cache_hbm in (False, True):
        cluster, run = await make(make_cluster, form, prefix_cache_hbm=prefix_cache_hbm)
        answers = []
        for num_tokens in (60, 61, 64, 70, 35, 64):
            for sampling in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 77}):
                answers.append((await run(prompt(80)[:num_tokens], max_tokens=15, **sampling)).token_ids)
        found.append(answers)
        await cluster.at_rest()
    assert found[0] == found[1]
    assert sum(hits(worker, "hbm") for worker in cluster.workers) > 0


async def test_a_hit_in_the_pages_copies_nothing_and_asks_no_store(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    await cluster.run_local(prompt(60), max_tokens=2)
    await cluster.at_rest()
    held = cluster.store.stats()
    again = await cluster.run_local([*prompt(60)[:56], 9], max_tokens=5)
    assert again.token_ids == greedy([*prompt(60)[:56], 9], 5)
    state = again.admitted.state
    assert (state.num_cached_tokens, state.phases.num_bytes_loaded, state.phases.load_transport) == (56, 0, "")
    assert cluster.store.stats().num_query_blocks == held.num_query_blocks
    assert hits(cluster.decode, "hbm") == 56


async def test_a_hit_ends_inside_a_block_where_two_prompts_part(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    first, second = prompt(60), [*prompt(60)[:53], 4, 4, 4, 4, 4]
    await cluster.run_local(first, max_tokens=4)
    answer = await cluster.run_local(second, max_tokens=8)
    assert answer.admitted.state.num_cached_tokens == 53 and answer.token_ids == greedy(second, 8)
    # what was copied from is as it was
    assert (await cluster.run_local(first, max_tokens=8)).token_ids == greedy(first, 8)
    await cluster.at_rest()


async def test_a_hand_off_to_a_worker_that_has_the_leading_blocks_brings_the_others(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    await cluster.run(prompt(60), max_tokens=20)
    await cluster.at_rest()
    metrics, block_bytes = cluster.decode.metrics.registry, cluster.decode.engine.schema.block_bytes
    labels = {"transport": "shm", "direction": "fetch"}
    before = metrics.get_sample_value("halfmoon_kv_transfer_bytes_total", labels)
    second = [*prompt(60)[:56], *prompt(20, 1)]
    assert (await cluster.run(second, max_tokens=10)).token_ids == greedy(second, 10)
    assert metrics.get_sample_value("halfmoon_kv_transfer_bytes_total", labels) - before == 3 * block_bytes, "20 tokens behind 7 blocks"
    await cluster.at_rest()


async def test_requests_with_one_prompt_at_once_compute_it_once(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"max_prefill_tokens_per_step": 16})
    tokens = prompt(120)
    steps = computed(cluster.decode.engine)
    answers = await asyncio.gather(*(cluster.run_local([*tokens, seed], max_tokens=6) for seed in range(4, 10)))
    for seed, answer in zip(range(4, 10), answers, strict=True):
        assert answer.token_ids == greedy([*tokens, seed], 6)
    num_prefilled = sum(size for _, start, size in steps if start < 121)
    assert num_prefilled <= 121 + 5 * (16 + 1), "the first one computes the prompt, the others what is their own and a block or two"
    states = [answer.admitted.state for answer in answers]
    assert sum(state.num_tokens - state.num_cached_tokens for state in states) == num_prefilled, "what is told is what was computed"
    await cluster.at_rest()


async def test_pages_that_run_short_take_cached_blocks_and_running_sequences_keep_theirs(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 256, "max_prefill_tokens_per_step": 24})
    allocator = cluster.decode.worker.allocator
    prompts = [prompt(40 + 7 * index, index) for index in range(4)]
    for _ in range(3):
        answers = await asyncio.gather(*(cluster.run_local(tokens, max_tokens=40) for tokens in prompts))
        for tokens, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == greedy(tokens, 40)
    assert 0 < allocator.num_cached <= allocator.num_pages
    await cluster.at_rest()


@pytest.mark.parametrize("both", [0, 1])
async def test_any_mix_of_cancelled_requests_with_common_prefixes_leaves_every_page_free(
    make_cluster: Any, greedy: Greedy, both: int
) -> None:
    cluster = await make_cluster(both=both, prefill={"max_tokens_per_step": 24}, decode={"kv_capacity_tokens": 512})
    texts = [prompt(150), [*prompt(150)[:70], *prompt(80, 1)], [*prompt(150)[:75], *prompt(80, 2)]]

    def is_right(tokens: list[int], answer: list[int], num_tokens: int) -> bool:
        return answer == greedy(tokens, num_tokens)

    await cluster.any_mix(random.Random(5), texts, 30, 6, 6, is_right)
    await cluster.every_page_is_free()


async def test_a_preempted_sequence_goes_on_from_the_blocks_that_are_still_there(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 200, "max_prefill_tokens_per_step": 24})
    prompts = [prompt(50, index) for index in range(3)]
    answers = await asyncio.gather(*(cluster.run_local(tokens, max_tokens=60) for tokens in prompts))
    for tokens, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == greedy(tokens, 60)
    assert sum(answer.finished.phases.num_preemptions for answer in answers) > 0
    await cluster.at_rest()


async def test_without_the_cache_pages_are_free_after_their_sequence(make_cluster: Any) -> None:
    cluster = await make_cluster(prefix_cache_hbm=False)
    await cluster.run_local(prompt(60), max_tokens=4)
    await cluster.at_rest()
    assert cluster.decode.worker.allocator.num_cached == 0 and cluster.decode.load().num_cached_pages == 0
    assert hits(cluster.decode, "hbm") == 0


@pytest.mark.parametrize("form", [COUPLED, HANDED_OFF])
async def test_a_tenant_finds_its_own_prefix_and_nothing_of_another_s(make_cluster: Any, greedy: Greedy, form: str) -> None:
    """In pages and in the store, whole blocks and parts: what is computed for it is what would be computed alone."""
    cluster, run = await make(make_cluster, form)
    text = prompt(70, seed=9)
    wanted = greedy(text, 8)
    first, second = (root_key(b"schema", salt=salt) for salt in (b"one", b"two"))
    for root, is_known in ((first, False), (second, False), (b"", False), (second, True), (first, True), (b"", True)):
        answer = await run(text, max_tokens=8, root=root)
        assert answer.token_ids == wanted
        assert (answer.admitted.state.num_cached_tokens >= 64) == is_known and (is_known or not answer.admitted.state.num_cached_tokens)
        await cluster.at_rest()
