"""The prefill worker end to end on loopback: what stands in the store afterwards, and what it costs."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from halfmoon.engine.sequence import StepChunk
from halfmoon.protocol.errors import (
    DeadlineExceeded,
    HalfmoonError,
    HandoffAborted,
    HandoffCorrupt,
    RequestCancelled,
    StoreUnavailable,
    WorkerLost,
)
from halfmoon.protocol.grpc_errors import from_rpc_error
from halfmoon.protocol.v1 import worker_pb2
from halfmoon.tests.waiting import until


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


async def error_of(call: Any) -> HalfmoonError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return from_rpc_error(failure.value, "prefill worker")


async def reply(call: Any) -> Any:
    return await call


def at_rest(*sites: Any) -> bool:
    leases = sum(site.store.stats().num_leases + site.store.stats().num_handoffs for site in sites)
    return leases == 0 and all(site.worker.scheduler.at_rest for site in sites)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("num_tokens", [3, 64, 77])
async def test_the_hand_off_holds_the_kv_of_one_forward_pass(make_site: Any, reference: Any, transport: str, num_tokens: int) -> None:
    site = await make_site(transport=transport, max_tokens_per_step=16)
    reply = await site.start(prompt(num_tokens), "h")
    found, expected = await site.fetch("h"), reference(prompt(num_tokens))
    np.testing.assert_allclose(found.kv, expected.kv, atol=2e-5)
    assert found.state.first_token.token_id == reply.state.first_token.token_id == expected.token_id
    assert (found.state.num_tokens, found.state.num_cached_tokens) == (num_tokens, 0)
    phases = reply.state.phases
    assert phases.transport == ("shm" if transport == "auto" else "grpc")
    assert phases.num_bytes_pushed == found.kv.nbytes
    assert site.metric("halfmoon_kv_transfer_bytes_total", transport=phases.transport, direction="push") == found.kv.nbytes
    await until(lambda: at_rest(site))


async def test_prompts_that_share_steps_share_their_seconds(make_site: Any) -> None:
    site = await make_site(max_tokens_per_step=16)
    site.worker.slow(0.02)
    began = time.monotonic()
    replies = await asyncio.gather(*(site.start(prompt(32, seed), f"h{seed}") for seed in range(3)))
    elapsed_s = time.monotonic() - began
    shares = [reply.state.phases.compute_s for reply in replies]
    assert 6 * 0.02 <= sum(shares) <= elapsed_s, "three times 32 tokens are six steps of 16, whoever they were for"
    assert max(shares) < max(reply.state.phases.prefill_s for reply in replies)


async def test_a_hand_off_is_sealed_while_the_step_after_its_last_one_is_still_computed(
    make_site: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device the pushes of a step that was launched ahead wait for its layers, and what is asked for after them waits, too."""
    site = await make_site(max_tokens_per_step=16)
    engine, pages, scheduler = site.worker.engine, site.worker.worker.executor.pages, site.worker.scheduler
    forward, ready, num_ready = engine.forward, scheduler.ready, itertools.count(1)
    both_are_ready, computed = threading.Event(), threading.Event()
    launched: list[list[StepChunk]] = []

    def note_ready(*arguments: Any) -> None:
        ready(*arguments)
        if next(num_ready) == 2:
            both_are_ready.set()

    def launch(chunks: list[StepChunk], *, after_layer: Any = None) -> Any:
        launched.append(chunks)
        assert both_are_ready.wait(60)
        if len(launched) == 2:
            pages.when_landed(lambda: computed.wait(60))
        logits, sampled = forward(chunks, after_layer=after_layer), [chunk.sequence for chunk in chunks]
        token_ids = [sample.token_id for sample in engine.sample(logits, sampled)]
        return SimpleNamespace(tokens=lambda: token_ids)

    monkeypatch.setattr(scheduler, "ready", note_ready)
    monkeypatch.setattr(engine, "launch", launch)
    calls = [asyncio.ensure_future(reply(site.start(prompt(16, seed), f"h{seed}", queue_order=seed))) for seed in range(2)]
    sealed, _ = await asyncio.wait(calls, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert len(launched) == 2 and len(sealed) == 1 and not computed.is_set()
    computed.set()
    tokens = [found.state.first_token.token_id for found in await asyncio.gather(*calls)]
    assert tokens == [reference(prompt(16, seed)).token_id for seed in range(2)]


async def test_an_earlier_owners_kv_does_not_travel_in_a_partial_page(make_site: Any, reference: Any) -> None:
    site = await make_site(kv_capacity_tokens=64)
    await site.start(prompt(64, 1), "dirty")
    await until(lambda: site.worker.scheduler.at_rest)
    await site.start(prompt(60), "clean")
    found = await site.fetch("clean")
    np.testing.assert_allclose(found.kv, reference(prompt(60)).kv, atol=2e-5)
    tail = found.kv.reshape(3, 8, 2, 2, 8, -1)[:, 7, :, :, 4:]
    assert not tail.any()


async def test_blocks_that_the_store_has_are_neither_computed_nor_pushed(make_site: Any, reference: Any) -> None:
    site = await make_site(prefix_cache_hbm=False)
    block_bytes = site.worker.engine.schema.block_bytes
    await site.start(prompt(60), "one")
    reply = await site.start([*prompt(60)[:40], *prompt(30, 1)], "two")
    phases = reply.state.phases
    assert (reply.state.num_cached_tokens, phases.num_bytes_loaded, phases.num_bytes_pushed) == (40, 5 * block_bytes, 4 * block_bytes)
    assert phases.load_transport == "shm"
    found = await site.fetch("two")
    np.testing.assert_allclose(found.kv, reference([*prompt(60)[:40], *prompt(30, 1)]).kv, atol=2e-5)
    assert site.metric("halfmoon_prefix_cache_hits_total", tier="local") == 40
    assert site.metric("halfmoon_step_tokens_total", role="prefill") == 60 + 30


async def test_a_prompt_cached_to_its_end_computes_one_token(make_site: Any, reference: Any) -> None:
    site = await make_site()
    await site.start(prompt(64), "one")
    reply = await site.start(prompt(64), "two")
    assert reply.state.num_cached_tokens == 63
    assert reply.state.first_token.token_id == reference(prompt(64)).token_id
    assert reply.state.phases.num_bytes_pushed == 0
    assert site.metric("halfmoon_step_tokens_total", role="prefill") == 65


async def test_a_hand_off_to_another_nodes_store_leaves_the_blocks_in_the_own_one_too(make_site: Any, reference: Any) -> None:
    here, there = await make_site("node-t", prefix_cache_hbm=False), await make_site("node-u", name="prefill-1", prefix_cache_hbm=False)
    reply = await here.start(prompt(60), "h", into=there)
    assert reply.state.phases.transport == "tcp"
    np.testing.assert_allclose((await there.fetch("h")).kv, reference(prompt(60)).kv, atol=2e-5)
    await until(lambda: at_rest(here, there))
    client = await here.client()
    assert await client.lookup(here.keys(prompt(60))) == 7
    await client.close()
    # found here now, and all of it has to be pushed: the other store forgets nothing, so take a new tail for a new block
    again = await here.start([*prompt(60), *prompt(20, 2)], "next", into=there)
    assert again.state.num_cached_tokens == 56
    np.testing.assert_allclose((await there.fetch("next")).kv, reference([*prompt(60), *prompt(20, 2)]).kv, atol=2e-5)


async def test_a_prefix_found_only_here_is_pushed_to_the_hand_offs_store(make_site: Any, reference: Any) -> None:
    here, there = await make_site("node-t", prefix_cache_hbm=False), await make_site("node-u", name="prefill-1", prefix_cache_hbm=False)
    await here.start(prompt(64), "one")
    for num_tokens in (64, 60):
        reply = await here.start(prompt(64)[:num_tokens], f"h{num_tokens}", into=there)
        assert reply.state.num_cached_tokens == min(63, num_tokens // 8 * 8)
        found = await there.fetch(f"h{num_tokens}")
        np.testing.assert_allclose(found.kv, reference(prompt(64)[:num_tokens]).kv, atol=2e-5)
    await until(lambda: at_rest(there))


async def test_a_longer_prefix_is_loaded_from_the_store_that_the_proxy_names(make_site: Any, reference: Any) -> None:
    here, there = await make_site("node-t", prefix_cache_hbm=False), await make_site("node-u", name="prefill-1", prefix_cache_hbm=False)
    await here.start(prompt(60)[:20], "short")
    await there.start(prompt(60), "long")
    hint = worker_pb2.PrefixHint(store_address=there.store.address, num_blocks=7)
    reply = await here.start(prompt(60), "h", prefix=hint)
    assert reply.state.num_cached_tokens == 56
    assert here.metric("halfmoon_prefix_cache_hits_total", tier="remote") == 56
    np.testing.assert_allclose((await here.fetch("h")).kv, reference(prompt(60)).kv, atol=2e-5)
    await until(lambda: there.store.stats().num_leases == 0)


async def test_a_hint_that_is_no_longer_than_what_is_here_is_not_followed(make_site: Any) -> None:
    here = await make_site(prefix_cache_hbm=False)
    await here.start(prompt(60), "one")
    hint = worker_pb2.PrefixHint(store_address="127.0.0.1:9", num_blocks=7)
    assert (await here.start(prompt(60), "two", prefix=hint)).state.num_cached_tokens == 56
    assert here.metric("halfmoon_prefix_load_failures_total", reason="store_unavailable") is None


async def test_a_prefix_in_a_store_that_is_gone_is_computed(make_site: Any, reference: Any) -> None:
    here = await make_site()
    hint = worker_pb2.PrefixHint(store_address="127.0.0.1:9", num_blocks=7)
    reply = await here.start(prompt(60), "h", prefix=hint)
    assert reply.state.num_cached_tokens == 0
    assert reply.state.first_token.token_id == reference(prompt(60)).token_id
    assert here.metric("halfmoon_prefix_load_failures_total", reason="store_unavailable") == 1


async def test_a_corrupt_prefix_does_not_reach_the_hand_off_and_the_next_attempt_computes_it(make_site: Any, reference: Any) -> None:
    site = await make_site(name="prefill-bad", flip_pushed_bytes=True)
    await site.start(prompt(60), "bad")
    honest = await make_site(store=site.store)
    error = await error_of(honest.start(prompt(60), "refused"))
    assert isinstance(error, HandoffCorrupt) and error.retryable
    reply = await honest.start(prompt(60), "good")
    assert reply.state.num_cached_tokens == 0
    assert honest.metric("halfmoon_prefix_load_failures_total", reason="handoff_corrupt") == 1
    np.testing.assert_allclose((await honest.fetch("good")).kv, reference(prompt(60)).kv, atol=2e-5)


async def test_a_corrupt_prefix_is_computed_where_the_hand_off_goes_to_another_store(make_site: Any, reference: Any) -> None:
    site = await make_site(name="prefill-bad", flip_pushed_bytes=True)
    await site.start(prompt(60), "bad")
    honest, there = await make_site(store=site.store), await make_site("node-u", name="prefill-1")
    reply = await honest.start(prompt(60), "good", into=there)
    assert reply.state.num_cached_tokens == 0
    np.testing.assert_allclose((await there.fetch("good")).kv, reference(prompt(60)).kv, atol=2e-5)


async def test_a_full_store_does_not_keep_a_prefix_from_being_loaded_and_let_go(make_site: Any) -> None:
    site = await make_site(prefix_cache_hbm=False)
    await site.start(prompt(60), "cached")
    await site.fetch("cached")
    await until(lambda: at_rest(site))
    client = await site.client("hoarder")
    keys = [number.to_bytes(16) for number in range(site.store.accounting().num_slots - 7)]
    hoard = await client.reserve("hoard", 1, keys, len(keys), 600.0)  # all but the cached blocks
    call = site.start([*prompt(60)[:56], *prompt(20, 1)], "h", deadline_s=600.0)
    await until(lambda: site.metric("halfmoon_prefix_cache_hits_total", tier="local") == 56)
    await until(lambda: site.store.stats().num_leases == 1)
    assert site.worker.scheduler.num_running == 1, "it waits for room"
    await hoard.abort(RequestCancelled("enough"))
    assert (await call).state.num_cached_tokens == 56
    await client.close()


async def test_a_short_prompt_does_not_wait_for_a_long_one(make_site: Any) -> None:
    site = await make_site(max_tokens_per_step=16)
    site.worker.slow(0.01)
    long = asyncio.ensure_future(site.start(prompt(250), "long"))
    await until(lambda: site.worker.scheduler.num_running == 1)
    await site.start(prompt(12), "short")
    assert not long.done()
    await long


async def test_an_aborted_hand_off_ends_its_prefill_with_the_reason(make_site: Any) -> None:
    site = await make_site(max_tokens_per_step=8)
    steps = site.worker.slow(0.1)
    call = site.start(prompt(200), "h")
    await until(lambda: site.store.stats().num_bytes_pushed > 0)
    client = await site.client()
    await client.abort("h", 1, RequestCancelled("the user closed the window"))
    error = await error_of(call)
    await until(lambda: at_rest(site))
    assert len(steps) < 25, "the prompt was computed to its end"
    assert isinstance(error, HandoffAborted) and "the user closed the window" in error.message
    await client.close()


async def test_cancelling_in_the_queue_in_the_load_and_in_a_step_leaves_nothing(make_site: Any) -> None:
    site = await make_site(max_tokens_per_step=8, kv_capacity_tokens=128)
    site.worker.slow(0.01)
    await site.start(prompt(120, 1), "cached")
    calls = [site.start(prompt(120, seed), f"c{seed}") for seed in (1, 2, 3)]
    for delay_s, call in zip((0.003, 0.03, 0.05), calls, strict=True):
        await asyncio.sleep(delay_s)
        call.cancel()
    await until(lambda: site.worker.scheduler.at_rest and site.store.stats().num_leases == 0)
    assert site.worker.scheduler.allocator.num_free == 16


async def test_a_deadline_that_passes_in_prefill_says_so(make_site: Any) -> None:
    site = await make_site(max_tokens_per_step=8)
    site.worker.slow(0.2)  # 13 steps
    error = await error_of(site.start(prompt(100), "h", deadline_s=1.0))
    assert isinstance(error, DeadlineExceeded) and "in prefill" in error.message
    await until(lambda: at_rest(site))


async def test_the_death_of_a_hand_offs_store_fails_its_prefill_at_once(make_site: Any) -> None:
    here, there = await make_site("node-t", max_tokens_per_step=8), await make_site("node-u", name="prefill-1")
    steps = here.worker.slow(0.1)
    calls = here.start(prompt(200), "h", into=there), here.start(prompt(100, 1), "own")
    await until(lambda: there.store.stats().num_bytes_pushed > 0)
    await there.store.stop(0.0)
    assert isinstance(await error_of(calls[0]), StoreUnavailable)
    assert len(steps) < 25, "the prompt was computed to its end"
    assert isinstance(await error_of(here.start(prompt(200), "h2", into=there)), StoreUnavailable)
    assert (await calls[1]).state.num_tokens == 100


async def test_calls_that_need_a_new_store_at_the_same_time_share_one_session(make_site: Any) -> None:
    here, there = await make_site("node-t"), await make_site("node-u", name="prefill-1")
    await asyncio.gather(*(here.start(prompt(20, seed), f"h{seed}", into=there) for seed in range(4)))
    assert there.store.stats().num_sessions == 2


async def test_load_is_what_is_left_to_compute(make_site: Any) -> None:
    site = await make_site(max_tokens_per_step=8, kv_capacity_tokens=128)
    site.worker.slow(0.02)
    calls = [site.start(prompt(100, seed), f"h{seed}") for seed in range(2)]
    await until(lambda: site.worker.load().num_waiting == 1)
    load = site.worker.load()
    assert load.num_running == 1 and 100 < load.num_outstanding_tokens <= 200 and load.kv_usage_ratio == 13 / 16
    await asyncio.gather(*calls)
    assert site.worker.load().num_outstanding_tokens == 0


async def test_a_transfer_that_breaks_ends_every_call_and_the_worker(make_site: Any) -> None:
    site = await make_site()

    def fail(*_: Any) -> None:
        raise MemoryError("no memory for the slice")

    site.worker.engine.cache.read_bytes = fail
    error = await error_of(site.start(prompt(30), "h"))
    assert isinstance(error, WorkerLost) and "no memory for the slice" in error.message
    with pytest.raises(MemoryError):
        await site.worker.serve_until_stopped()
