"""Both workers and a store, end to end on loopback, against transformers' greedy generate."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from halfmoon.deploy.worker import make_worker
from halfmoon.kvstore.client import BlockWriter, StoreClient
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.config import DecodeConfig, PrefillConfig
from halfmoon.protocol.errors import (
    DeadlineExceeded,
    HalfmoonError,
    HandoffAborted,
    HandoffCorrupt,
    HandoffError,
    HandoffIncomplete,
    InvalidRequest,
    PromptTooLong,
    RequestCancelled,
    SchemaMismatch,
)
from halfmoon.protocol.grpc_errors import from_rpc_error
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, control_pb2, worker_pb2
from halfmoon.tests.waiting import until

Greedy = Callable[[list[int], int], list[int]]


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


def push_zeros(writer: BlockWriter, schema: KVSchema, num_layers: int | None = None) -> None:
    for layer in range(schema.num_layers if num_layers is None else num_layers):
        writer.push(layer, 0, np.zeros((writer.num_blocks, schema.layer_bytes), dtype=np.uint8))


def state_with_token(num_tokens: int, token_id: int) -> common_pb2.HandoffState:
    return common_pb2.HandoffState(num_tokens=num_tokens, first_token=common_pb2.TokenOutput(token_id=token_id))


@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 64, 75, 200])
async def test_tokens_are_those_of_transformers(make_cluster: Any, greedy: Greedy, transport: str, num_tokens: int) -> None:
    cluster = await make_cluster(transport)
    answer = await cluster.run(prompt(num_tokens), max_tokens=20)
    assert answer.token_ids == greedy(prompt(num_tokens), 20)
    assert answer.state.phases.transport == ("shm" if transport == "auto" else "grpc")
    await cluster.at_rest()


async def test_many_requests_at_once_each_get_their_own_tokens(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(prefill={"max_tokens_per_step": 48}, decode={"max_running": 6})
    prompts = [prompt(5 + 9 * index, index) for index in range(16)]
    answers = await asyncio.gather(*(cluster.run(token_ids, max_tokens=8 + index) for index, token_ids in enumerate(prompts)))
    for index, (token_ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.token_ids == greedy(token_ids, 8 + index)
        assert answer.finished.reason == common_pb2.FINISH_REASON_LENGTH
    await cluster.at_rest()


async def test_a_prompt_in_chunks_of_one_block_gives_the_same_tokens(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(prefill={"max_tokens_per_step": 8})
    answer = await cluster.run(prompt(99), max_tokens=12)
    assert answer.token_ids == greedy(prompt(99), 12)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("num_tokens", [64, 70])
async def test_a_prompt_seen_before_is_loaded_and_not_computed(make_cluster: Any, greedy: Greedy, transport: str, num_tokens: int) -> None:
    cluster = await make_cluster(transport, prefix_cache_hbm=False)
    first = await cluster.run(prompt(num_tokens), max_tokens=10)
    again = await cluster.run(prompt(num_tokens), max_tokens=10)
    assert (first.state.num_cached_tokens, again.state.num_cached_tokens) == (0, min(64, num_tokens - 1))
    assert again.token_ids == first.token_ids == greedy(prompt(num_tokens), 10)
    assert again.state.phases.num_bytes_loaded == 8 * cluster.decode.engine.schema.block_bytes
    await cluster.at_rest()


async def test_the_very_next_turn_finds_the_blocks_of_the_answer(
    make_cluster: Any, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfmoon.decode_worker.worker.CACHE_PATIENCE_S", 600.0)  # whatever else this machine does
    cluster = await make_cluster()
    answer = await cluster.run(prompt(20), max_tokens=30)
    turn = [*prompt(20), *answer.token_ids, 5, 6, 7]
    following = await cluster.run(turn, max_tokens=5)
    assert following.state.num_cached_tokens == 48  # the KV of the answer's last token was never computed
    assert following.token_ids == greedy(turn, 5)


async def test_a_store_that_does_not_take_the_blocks_in_time_does_not_hold_up_the_end(make_cluster: Any) -> None:
    cluster = await make_cluster()
    stuck = threading.Event()
    sequence = cluster.sequence(prompt(20), max_tokens=30)
    decode = cluster.start_decode(sequence)
    await cluster.start_prefill(sequence)
    await until(lambda: cluster.decode.scheduler.num_running == 1)
    cluster.decode.transfer.submit(stuck.wait)  # what is cached waits behind it
    assert (await cluster.read(decode, cluster.answer())).finished is not None
    assert not cluster.decode.scheduler.at_rest
    stuck.set()
    await cluster.at_rest()


async def test_preempted_sequences_give_the_same_tokens(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 160, "max_prefill_tokens_per_step": 24})
    prompts = [prompt(30 + index, index) for index in range(4)]
    answers = await asyncio.gather(*(cluster.run(token_ids, max_tokens=60) for token_ids in prompts))
    for token_ids, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == greedy(token_ids, 60)
    num_preemptions = sum(answer.finished.phases.num_preemptions for answer in answers)
    assert num_preemptions > 0
    assert cluster.decode.metrics.registry.get_sample_value("halfmoon_num_preemptions_total") == num_preemptions
    await cluster.at_rest()


async def test_a_seed_draws_the_same_tokens_again_and_so_does_a_replay_of_half_the_answer(make_cluster: Any) -> None:
    cluster = await make_cluster(prefill={"max_tokens_per_step": 16})
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 1234, "max_tokens": 24, "num_logprobs": 2}
    first = await cluster.run(prompt(21), **sampling)
    other = await cluster.run(prompt(21), **{**sampling, "seed": 4321})
    assert first.token_ids != other.token_ids
    for num_sent in (1, 11, 23):
        replay = await cluster.run(prompt(21) + first.token_ids[:num_sent], num_prompt_tokens=21, **sampling)
        assert replay.token_ids == first.token_ids[num_sent:]
        expected = [token.logprob for token in first.tokens[num_sent:]]
        assert [token.logprob for token in replay.tokens] == pytest.approx(expected, abs=1e-3)
    assert all(len(token.top_logprobs) == 2 for token in first.tokens)


async def test_an_end_of_sequence_token_ends_the_answer_wherever_it_comes(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    tokens = greedy(prompt(12), 20)
    for position in (0, 7):
        stop = tokens[position]
        answer = await cluster.run(prompt(12), max_tokens=20, stop_token_ids=(stop,))
        assert answer.token_ids == tokens[: tokens.index(stop) + 1]
        assert answer.finished.reason == common_pb2.FINISH_REASON_STOP
    only = await cluster.run(prompt(12), max_tokens=1)
    assert (only.token_ids, only.finished.reason) == (tokens[:1], common_pb2.FINISH_REASON_LENGTH)
    await cluster.at_rest()


async def test_the_first_token_and_the_phases_come_with_the_admission(make_cluster: Any) -> None:
    cluster = await make_cluster()
    answer = await cluster.run(prompt(40), max_tokens=6)
    assert answer.admitted.state.first_token.token_id == answer.token_ids[0]
    assert answer.admitted.state.num_tokens == 40
    phases = answer.finished.phases
    assert answer.admitted.handoff_wait_s == phases.handoff_wait_s > 0
    assert 0 < phases.first_decode_s < phases.decode_s
    told = answer.state.phases
    assert told.num_bytes_pushed == 5 * cluster.decode.engine.schema.block_bytes
    assert min(told.queue_s, told.prefill_s, told.push_s) > 0
    assert 0.5 * told.prefill_s < told.compute_s <= told.prefill_s, "alone, it had the steps to itself"


async def test_stop_ends_a_request_as_finished_and_keeps_its_blocks(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    cluster.decode.slow(0.01)
    sequence = cluster.sequence(prompt(20), max_tokens=200)
    decode = cluster.start_decode(sequence)
    await cluster.start_prefill(sequence)
    async with asyncio.timeout(60):
        answer = cluster.answer()
        reading = asyncio.create_task(cluster.read(decode, answer))
        while len(answer.token_ids) < 30:
            await asyncio.sleep(0.01)
        assert (await cluster.decode_stub.Stop(worker_pb2.StopRequest(request_id=sequence.request_id))).found
        await reading
    assert answer.finished.reason == common_pb2.FINISH_REASON_STOP
    assert answer.token_ids == greedy(prompt(20), len(answer.token_ids))
    await cluster.at_rest()
    following = await cluster.run([*prompt(20), *answer.token_ids[:20]], max_tokens=2)
    assert following.state.num_cached_tokens == 39
    assert not (await cluster.decode_stub.Stop(worker_pb2.StopRequest(request_id=sequence.request_id))).found


async def test_cancelling_decode_frees_pages_and_leases_long_before_the_last_token(make_cluster: Any) -> None:
    cluster = await make_cluster()
    steps = cluster.decode.slow(0.02)
    sequence = cluster.sequence(prompt(50), max_tokens=200)
    decode = cluster.start_decode(sequence)
    await cluster.start_prefill(sequence)
    async for reply in decode:
        if reply.WhichOneof("event") == "tokens":
            break
    await until(lambda: cluster.store.stats().num_leases == 0)  # its blocks are in the pages: nothing is held in the store
    assert cluster.held()
    decode.cancel()
    await cluster.at_rest()
    assert len(steps) < 150, "it ran on to its last token"

    def load() -> control_pb2.MemberLoad:
        load = cluster.decode.load()
        del load.steps[:]
        load.num_cached_pages = 0  # what it computed stays
        return load

    await until(lambda: load() == control_pb2.MemberLoad())  # its last step may still be under way


async def test_cancelling_decode_while_it_waits_ends_the_hand_off_for_prefill_too(make_cluster: Any) -> None:
    cluster = await make_cluster(prefill={"max_tokens_per_step": 8})
    steps = cluster.prefill.slow(0.1)
    sequence = cluster.sequence(prompt(200))
    decode, prefill = cluster.start_decode(sequence), cluster.start_prefill(sequence)
    await until(lambda: cluster.store.stats().num_leases == 2)
    decode.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await prefill
    await cluster.at_rest()
    assert len(steps) < 25, "the prompt was computed to its end"
    error = from_rpc_error(failure.value, "prefill")
    assert isinstance(error, HandoffError) and "was cancelled in decode" in error.message


async def test_cancelling_prefill_tells_decode_why_and_frees_everything(make_cluster: Any) -> None:
    cluster = await make_cluster(prefill={"max_tokens_per_step": 8})
    steps = cluster.prefill.slow(0.1)
    sequence = cluster.sequence(prompt(200))
    decode, prefill = cluster.start_decode(sequence), cluster.start_prefill(sequence)
    await until(lambda: cluster.store.stats().num_bytes_pushed > 0)
    prefill.cancel()
    error = await cluster.error_of(decode)
    await cluster.at_rest()
    assert len(steps) < 25, "the prompt was computed to its end"
    assert isinstance(error, HandoffAborted) and "was cancelled in prefill" in error.message


async def test_a_failed_prefill_is_told_to_decode_before_anything_was_reserved(make_cluster: Any) -> None:
    cluster = await make_cluster(prefill={"kv_capacity_tokens": 64})
    cluster.prefill.slow(0.1)
    blocking = cluster.start_prefill(cluster.sequence(prompt(60, 1)))
    await until(lambda: cluster.prefill.scheduler.num_running == 1)
    queued = cluster.sequence(prompt(30), deadline_s=0.05)
    patient = common_pb2.SequenceSpec()
    patient.CopyFrom(queued)
    patient.deadline_s = 600.0
    decode = cluster.start_decode(patient)
    error = await cluster.error_of(cluster.start_prefill(queued))
    assert isinstance(error, DeadlineExceeded) and "in the prefill worker's queue" in error.message
    error = await cluster.error_of(decode)
    assert isinstance(error, HandoffError) and "ran out of time in the prefill worker's queue" in error.message
    await blocking


async def test_a_decode_whose_hand_off_never_comes_ends_at_its_deadline(make_cluster: Any) -> None:
    cluster = await make_cluster()
    error = await cluster.error_of(cluster.start_decode(cluster.sequence(prompt(9), deadline_s=0.1)))
    assert isinstance(error, DeadlineExceeded)
    await cluster.at_rest()


async def test_a_decode_ends_at_its_deadline_with_the_tokens_so_far(make_cluster: Any) -> None:
    cluster = await make_cluster()
    cluster.decode.slow(0.02)
    sequence = cluster.sequence(prompt(9), deadline_s=2.0, max_tokens=200)
    decode = cluster.start_decode(sequence)
    await cluster.start_prefill(sequence)
    answer = cluster.answer()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await cluster.read(decode, answer)
    error = from_rpc_error(failure.value, "decode")
    assert isinstance(error, DeadlineExceeded) and "in decode, with" in error.message
    assert len(answer.token_ids) > 2
    await cluster.at_rest()


async def test_a_sequence_that_can_never_fit_is_refused_with_the_limit(make_cluster: Any) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 64}, prefill={"kv_capacity_tokens": 64})
    for call, limit in (
        (cluster.start_decode(cluster.sequence(prompt(50), max_tokens=15)), 64),
        (cluster.start_decode(cluster.sequence(prompt(200), max_tokens=100)), 256),
        (cluster.start_prefill(cluster.sequence(prompt(65))), 64),
        (cluster.start_prefill(cluster.sequence(prompt(256))), 255),
    ):
        error = await cluster.error_of(call)
        assert isinstance(error, PromptTooLong) and error.fields["limit"] == limit, error


async def test_tokens_that_the_model_does_not_have_are_refused_and_break_nothing(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    for start in (cluster.start_decode, cluster.start_prefill):
        for sequence in (cluster.sequence([5, 160]), cluster.sequence([]), cluster.sequence([5, 6], num_prompt_tokens=3)):
            assert isinstance(await cluster.error_of(start(sequence)), InvalidRequest)
    answer = await cluster.run(prompt(9), max_tokens=3)
    assert answer.token_ids == greedy(prompt(9), 3)


async def test_block_keys_that_are_not_one_a_block_are_refused_by_both_workers_and_break_nothing(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    for start in (cluster.start_decode, cluster.start_prefill):
        for num_keys in (1, 3):
            sequence = cluster.sequence(prompt(17))
            sequence.block_keys.extend([bytes(16)] * num_keys)
            error = await cluster.error_of(start(sequence))
            assert isinstance(error, InvalidRequest) and f"{num_keys} keys" in error.message and "fill 2 blocks" in error.message
    answer = await cluster.run(prompt(9), max_tokens=3)
    assert answer.token_ids == greedy(prompt(9), 3)
    await cluster.at_rest()


async def test_the_keys_that_came_with_the_tokens_are_those_of_the_blocks(make_cluster: Any) -> None:
    cluster = await make_cluster()
    token_ids = prompt(17)
    sent = [bytes([number]) * 16 for number in range(1, 3)]
    sequence = cluster.sequence(token_ids, max_tokens=2)
    sequence.block_keys.extend(sent)
    decode = cluster.start_decode(sequence)
    await cluster.start_prefill(sequence)
    await cluster.read(decode, cluster.answer())
    await cluster.at_rest()
    client = await StoreClient.attach(cluster.store.address, client_id="reader", node_id="elsewhere", schema=cluster.decode.engine.schema)
    assert (await client.lookup(sent)) == 2
    await client.close()


async def test_kv_altered_on_its_way_is_refused_and_counted(make_cluster: Any) -> None:
    for transport in ("auto", "grpc"):
        cluster = await make_cluster(transport, flip_pushed_bytes=True)
        sequence = cluster.sequence(prompt(40))
        decode = cluster.start_decode(sequence)
        await cluster.start_prefill(sequence)
        error = await cluster.error_of(decode)
        assert isinstance(error, HandoffCorrupt) and "checksum of block 0" in error.message
        assert cluster.decode.metrics.registry.get_sample_value("halfmoon_handoffs_refused_total", {"reason": "handoff_corrupt"}) == 1
        await cluster.at_rest()


async def test_a_hand_off_that_is_not_the_requests_is_refused_with_what_was_wrong(make_cluster: Any) -> None:
    """Sealed and whole in the store's eyes, written by a client of the test's own."""
    cluster = await make_cluster()
    engine = cluster.decode.engine
    tokens = prompt(20)
    keys = block_keys(root_key(engine.schema.fingerprint), tokens, engine.page_size)
    other = block_keys(root_key(engine.schema.fingerprint), [*tokens[:8], *prompt(12, 1)], engine.page_size)
    good = common_pb2.HandoffState(num_tokens=20, first_token=common_pb2.TokenOutput(token_id=5))
    fewer = common_pb2.HandoffState(num_tokens=19, first_token=good.first_token)
    client = await StoreClient.attach(cluster.store.address, client_id="test", node_id="node-a", schema=engine.schema)
    for block_ids, num_blocks, state, error_type, words in (
        (other, 3, good, HandoffCorrupt, "other tokens than the request from block 1 on"),
        (keys, 2, good, HandoffIncomplete, "has 2 blocks; the request's 20 tokens make 3 of 8"),
        (keys[:1], 2, good, HandoffIncomplete, "has 2 blocks"),
        (keys, 3, fewer, HandoffIncomplete, "holds the KV of 19 tokens; the request has 20"),
        (keys, 3, common_pb2.HandoffState(num_tokens=20), HandoffIncomplete, "without its state or first token"),
        (keys, 3, state_with_token(20, 160), HandoffCorrupt, "token 160 as its first"),
    ):
        sequence = cluster.sequence(tokens)
        decode = cluster.start_decode(sequence)
        writer = await client.reserve(sequence.request_id, 1, block_ids, num_blocks, 5.0)
        with contextlib.suppress(HalfmoonError):  # a layout is refused at once, maybe before the seal
            await asyncio.to_thread(push_zeros, writer, engine.schema)
            await writer.seal(state)
        error = await cluster.error_of(decode)
        assert type(error) is error_type and words in error.message, error
        await cluster.at_rest()
    await client.close()


async def test_a_hand_off_that_is_never_sealed_is_not_decoded(make_cluster: Any) -> None:
    cluster = await make_cluster()
    engine = cluster.decode.engine
    sequence = cluster.sequence(prompt(20))
    decode = cluster.start_decode(sequence)
    client = await StoreClient.attach(cluster.store.address, client_id="prefill-x", node_id="node-a", schema=engine.schema)
    keys = block_keys(root_key(engine.schema.fingerprint), prompt(20), engine.page_size)
    writer = await client.reserve(sequence.request_id, 1, keys, 3, 5.0)
    await asyncio.to_thread(push_zeros, writer, engine.schema, 2)
    with pytest.raises(HandoffIncomplete, match="block 0 from layer 2"):
        await writer.seal(common_pb2.HandoffState(num_tokens=20))
    await client.close()  # as a killed prefill worker would
    error = await cluster.error_of(decode)
    assert isinstance(error, HandoffAborted) and "prefill-x" in error.message
    await cluster.at_rest()


async def test_a_worker_with_another_kv_format_does_not_start(make_cluster: Any) -> None:
    cluster = await make_cluster()
    worker = make_worker(
        dataclasses.replace(cluster.decode.life.worker_address, worker_id="decode-1"),
        role="decode",
        options=dataclasses.replace(cluster.options, block_size=16),
        prefill=PrefillConfig(),
        decode=DecodeConfig(),
    )
    with pytest.raises(SchemaMismatch, match="block_size"):
        await worker.start()


async def test_the_proxy_is_told_who_joins_and_how_loaded_it_is(make_cluster: Any, members: Any) -> None:
    cluster = await make_cluster()
    await asyncio.gather(cluster.prefill.life.joined.wait(), cluster.decode.life.joined.wait())
    info = members.infos["decode-0"]
    assert (info.role, info.address, info.max_model_len) == (control_pb2.ROLE_DECODE, cluster.decode.address, 256)
    assert (info.store_address, info.store_id, info.node_id) == (cluster.store.address, cluster.store.store_id, "node-a")
    assert (info.kv_capacity_tokens, info.device, len(info.incarnation)) == (8 * 256, "cpu", 32)
    assert KVSchema.from_proto(info.schema) == cluster.decode.engine.schema
    assert members.infos["prefill-0"].kv_capacity_tokens == 2 * 256
    waiting = cluster.start_decode(cluster.sequence(prompt(30)))
    await until(lambda: members.loads["decode-0"].num_waiting == 1 and members.loads["decode-0"].num_outstanding_tokens == 30)
    waiting.cancel()
    await until(lambda: members.loads["decode-0"].num_outstanding_tokens == 0)
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{info.metrics_address}/metrics").read().decode())
    waiting = next(line for line in page.splitlines() if line.startswith("halfmoon_num_requests_waiting{"))
    assert 'role="decode"' in waiting and 'worker="decode-0"' in waiting and waiting.endswith(" 0.0")


@pytest.mark.parametrize("transport", ["auto", "grpc"])
async def test_any_mix_of_cancelled_calls_returns_to_rest(make_cluster: Any, greedy: Greedy, transport: str) -> None:
    settings: dict[str, Any] = {"prefill": {"max_tokens_per_step": 24, "kv_capacity_tokens": 320}, "decode": {"kv_capacity_tokens": 256}}
    cluster = await make_cluster(transport, arena_bytes=2**19, **settings)
    cluster.prefill.slow(0.002)
    rng = random.Random(transport)
    proxy = await StoreClient.attach(cluster.store.address, client_id="proxy", node_id="", schema=cluster.decode.engine.schema)

    async def cancelled(index: int) -> None:
        sequence = cluster.sequence(prompt(rng.randrange(1, 120), index % 5), max_tokens=rng.randrange(1, 60))
        calls = [cluster.start_decode(sequence), cluster.start_prefill(sequence)]
        await asyncio.sleep(rng.random() * 0.15)
        rng.shuffle(calls)
        calls[0].cancel()
        await asyncio.sleep(rng.random() * 0.02)
        calls[1].cancel()
        # prefill may have sealed it before either call was cancelled, and decode may never have come
        await proxy.abort(sequence.request_id, 1, RequestCancelled("the client went away"))

    async def finished(index: int) -> None:
        token_ids = prompt(30 + index, index)
        assert (await cluster.run(token_ids, max_tokens=15)).token_ids == greedy(token_ids, 15)

    async with asyncio.timeout(100.0):
        await asyncio.gather(*(cancelled(index) for index in range(30)), *(finished(index) for index in range(6)))
    await cluster.at_rest()
    await proxy.close()
