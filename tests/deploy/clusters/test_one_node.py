"""A whole cluster on one node: 2 prefill, 2 decode, one store; KV moves through shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from halfmoon.client import Delta
from halfmoon.deploy.demo import TURNS, converse
from halfmoon.deploy.profile import profile
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.errors import InvalidRequest, Overloaded, PromptTooLong
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.conductor.predictors import CostModel

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

NUM_TOKENS = 64
NUM_TOKENS_EACH_OF_MANY = 24


@pytest.mark.parametrize("prompt_len", [1, 63, 64, 65, 300, 1500])
async def test_tokens_equal_those_of_transformers(cluster, reference, prompt_of, prompt_len: int) -> None:
    prompt = prompt_of(prompt_len)
    answer = await cluster.greedy(prompt, NUM_TOKENS)
    assert answer == reference.generate(prompt, NUM_TOKENS, answer)


async def test_32_concurrent_streams_give_the_same_tokens(cluster, reference, prompt_of) -> None:
    prompts = [prompt_of(20 + 7 * i, seed=1) for i in range(32)]
    answers = await asyncio.gather(*(cluster.greedy(prompt, NUM_TOKENS_EACH_OF_MANY) for prompt in prompts))
    assert answers == [reference.generate(prompt, NUM_TOKENS_EACH_OF_MANY, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    await cluster.at_rest()


async def test_the_second_turn_reports_its_cached_tokens_and_the_same_tokens(cluster, reference, prompt_of) -> None:
    first = prompt_of(200, seed=2)
    answer = await cluster.greedy(first, NUM_TOKENS)
    await cluster.at_rest()  # the answer's end does not wait long for its blocks to be cached
    second = (*first, *answer, *prompt_of(30, seed=3))
    result = await cluster.client.generate(token_ids=list(second), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    assert list(result.token_ids) == reference.generate(second, NUM_TOKENS, result.token_ids)
    # the answer's last token has no KV: it was sampled and never fed back
    assert result.usage.num_cached_tokens == (len(first) + NUM_TOKENS - 1) // 64 * 64
    assert result.phases.transport == "shm"


NO_SAMPLER_TAKES = [
    ("top_p", {"top_p": 1e-300}),
    ("top_p", {"top_p": 1e-46, "temperature": 1}),
    ("repetition_penalty", {"repetition_penalty": 1e-300, "top_p": 0.9}),
    ("repetition_penalty", {"repetition_penalty": 1e-38, "seed": 1}),
]
EDGES = [{"top_p": 1e-37}, {"repetition_penalty": 0.01, "top_p": 0.9}, {"temperature": 1e-300, "min_p": 1e-300}]


async def test_sampling_at_the_edge_of_numbers_is_served_or_refused_and_harms_nobody(cluster, reference, prompt_of) -> None:
    before = {member.info.incarnation for member in (await cluster.status()).members}
    prompts = [prompt_of(30 + 5 * i, seed=9) for i in range(12)]
    neighbours = asyncio.gather(*(cluster.greedy(prompt, NUM_TOKENS_EACH_OF_MANY) for prompt in prompts))
    url = f"http://{cluster.supervisor.http_address}/v1/completions"
    async with httpx.AsyncClient(timeout=120) as http:
        for param, sampling in NO_SAMPLER_TAKES:
            reply = await http.post(url, json={"prompt": [11, 12], "max_tokens": 4, **sampling})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        for sampling in EDGES:
            reply = await http.post(url, json={"prompt": [11, 12], "max_tokens": 4, **sampling})
            assert reply.status_code == 200, reply.text
    for prompt, answer in zip(prompts, await neighbours, strict=True):
        assert answer == reference.generate(prompt, NUM_TOKENS_EACH_OF_MANY, answer)
    assert {member.info.incarnation for member in (await cluster.status()).members} == before, "no worker was lost"
    await cluster.at_rest()


async def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(cluster, prompt_of) -> None:
    async def sampled(seed: int) -> list[int]:
        result = await cluster.client.generate(
            token_ids=list(prompt_of(40, seed=4)), max_tokens=32, temperature=1.0, seed=seed, ignore_eos=True
        )
        return list(result.token_ids)

    assert await sampled(7) == await sampled(7) != await sampled(8)


async def test_the_openai_client_works_unmodified(cluster) -> None:
    client = openai.AsyncOpenAI(base_url=f"http://{cluster.supervisor.http_address}/v1", api_key="unused", max_retries=0)
    messages = [{"role": "user", "content": "Say something, anything at all."}]
    whole = await client.chat.completions.create(model="demo", messages=messages, max_tokens=12, seed=5, logprobs=True, top_logprobs=2, n=2)
    assert len(whole.choices) == 2
    assert all(
        len(choice.logprobs.content) == whole.usage.completion_tokens / 2 or choice.finish_reason == "stop" for choice in whole.choices
    )
    text, usage = "", None
    options = {"include_usage": True}
    async for chunk in await client.chat.completions.create(
        model="demo", messages=messages, max_tokens=12, seed=5, stream=True, stream_options=options
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens <= 12
    completion = await client.completions.create(model="demo", prompt="Once upon a time", max_tokens=8, temperature=0)
    assert completion.usage.prompt_tokens > 0
    with pytest.raises(openai.BadRequestError, match="max"):
        await client.chat.completions.create(model="demo", messages=messages, max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="gpt-nothing", messages=messages)
    await client.close()


async def test_the_demo_answers_right_and_its_second_turn_hits_the_cache(cluster) -> None:
    shown = io.StringIO()
    outcome = await converse(cluster.supervisor.grpc_address, Console(file=shown, width=200))
    assert outcome.num_right == len(TURNS), shown.getvalue()
    assert outcome.num_cached_tokens >= 128
    assert "4821" in shown.getvalue() and "time to first token" in shown.getvalue()


async def test_a_large_request_is_parsed_in_a_process_that_ray_s_actor_starts(cluster) -> None:
    client = openai.AsyncOpenAI(base_url=f"http://{cluster.supervisor.http_address}/v1", api_key="none", max_retries=0)
    large = await client.completions.create(model="demo", prompt="Once upon a time", max_tokens=8, temperature=0, user="x" * 2**19)
    small = await client.completions.create(model="demo", prompt="Once upon a time", max_tokens=8, temperature=0)
    assert large.choices[0].text == small.choices[0].text


async def test_bad_requests_are_refused_with_limit_and_value_and_disturb_nobody(cluster, reference, prompt_of) -> None:
    prompt = prompt_of(100, seed=5)
    running = asyncio.create_task(cluster.greedy(prompt, NUM_TOKENS))
    with pytest.raises(PromptTooLong, match="4096"):
        await cluster.client.generate(token_ids=[5] * 5000, max_tokens=4)
    for wrong in ({"temperature": float("nan")}, {"max_tokens": 10**6}, {"token_ids": [10**6]}, {"token_ids": []}, {"top_p": 0.0}):
        with pytest.raises(InvalidRequest):
            await cluster.client.generate(**{"token_ids": [5, 6], "max_tokens": 4, **wrong})
    answer = await running
    assert answer == reference.generate(prompt, NUM_TOKENS, answer)


async def test_histograms_agree_with_what_the_client_measured(cluster, prompt_of) -> None:
    """TTFT and TPOT, request by request: the one that was disturbed least agrees to a tenth. On a busy machine it may be a late one."""
    ttft_gaps, tpot_gaps = [], []
    for i in range(60):
        if i >= 4 and min(ttft_gaps) < 0.1 and min(tpot_gaps) < 0.1:
            break
        before = served_sums(cluster.supervisor.metrics_address)
        start, arrivals = time.monotonic(), []
        stream = cluster.client.stream(token_ids=list(prompt_of(150, seed=10 + i)), max_tokens=24, temperature=0.0, ignore_eos=True)
        async for event in stream:
            arrivals += [time.monotonic()] * len(event.token_ids) if isinstance(event, Delta) else []
        after = served_sums(cluster.supervisor.metrics_address)
        ttft = arrivals[0] - start
        ttft_gaps.append(abs(after["time_to_first_token"] - before["time_to_first_token"] - ttft) / ttft)
        tpot = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)
        tpot_gaps.append(abs(after["time_per_output_token"] - before["time_per_output_token"] - tpot) / tpot)
        phases = (await stream.completion()).phases
        assert after["phase_prefill"] - before["phase_prefill"] == pytest.approx(phases.prefill_s, abs=1e-6)
        assert after["phase_decode"] - before["phase_decode"] == pytest.approx(phases.decode_s, abs=1e-6)
    assert min(ttft_gaps) < 0.1, ttft_gaps
    assert min(tpot_gaps) < 0.1, tpot_gaps


def served_sums(metrics_address: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://{metrics_address}/metrics").read().decode()
    sums = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_seconds_sum"):
                name = sample.name.removeprefix("halfmoon_").removesuffix("_seconds_sum")
                sums[f"phase_{sample.labels['phase']}" if "phase" in sample.labels else name] = sample.value
    return sums


async def test_ray_workers_do_not_find_our_folders_as_top_level_packages(ray_nodes: list[RayNode]) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def found() -> list[str]:
        import importlib.util

        spec = importlib.util.find_spec("kernels")
        return [str(spec.origin)] if spec else []

    assert await found.remote() == []


async def test_a_profile_is_a_cost_model_of_this_cluster(cluster, tmp_path: Path) -> None:
    await cluster.at_rest()
    model = (await profile(cluster.supervisor.grpc_address, cluster.control, seconds=1.0)).model
    model.save(tmp_path / "cost_model.yaml")
    assert CostModel.load(tmp_path / "cost_model.yaml") == model
    decode = (await cluster.members(control_pb2.ROLE_DECODE))[0]
    (stats,) = await cluster.store_stats()
    schema = KVSchema.from_proto(decode.schema)
    assert model.kv_bytes_per_token * schema.block_size == schema.block_bytes and model.num_layers == schema.num_layers
    assert model.kv_capacity_tokens == decode.kv_capacity_tokens
    assert model.cache_tokens * model.kv_bytes_per_token == stats.num_bytes_arena
    # more work takes longer, whatever the machine
    assert 0 < model.prefill_time(100, 0) < model.prefill_time(1000, 0)
    assert 0 < model.step_time(1, 100) <= model.step_time(16, 1600)
    await cluster.at_rest()


async def test_a_cluster_that_is_in_use_is_not_profiled(cluster, prompt_of) -> None:
    async with cluster.client.stream(token_ids=list(prompt_of(40)), max_tokens=1000, ignore_eos=True) as stream:
        await anext(stream)
        with pytest.raises(Overloaded, match="that is idle"):
            await profile(cluster.supervisor.grpc_address, cluster.control, seconds=1.0)


async def test_a_local_process_without_credentials_can_do_nothing_to_a_cluster(cluster, reference, prompt_of) -> None:
    members = [member.info for member in (await cluster.status()).members]
    prompt = list(prompt_of(80, seed=40))
    async with cluster.client.stream(token_ids=prompt, max_tokens=400, ignore_eos=True, temperature=0.0, request_id="victim") as stream:
        await anext(stream)
        found = await cluster.attacked()
        answer = await stream.completion()
    of_clients = ("drain at the clients' port", "join at the clients' port", "cancel another's request")
    at_clients_port = {name: found.pop(name) for name in of_clients}
    assert found.pop("move KV by a data connection") == ["INVALID"]
    assert len(found) == 20 and set(map(tuple, found.values())) == {("UNAUTHENTICATED",)}, found
    assert at_clients_port.pop("cancel another's request") == ["NOT_FOUND"]
    assert set(map(tuple, at_clients_port.values())) == {("UNIMPLEMENTED",)}
    assert list(answer.token_ids) == reference.generate(prompt, 400, answer.token_ids), "and nobody noticed"
    assert [member.info for member in (await cluster.status()).members] == members
    await cluster.at_rest()


def command_lines() -> Iterator[str]:
    """Of all processes of this machine that may be read."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            yield path.read_text(errors="replace")


async def test_no_log_and_no_metric_of_any_process_holds_a_prompt_an_answer_or_the_token(cluster) -> None:
    """Of Ray's own logs, too, for Ray has carried the token to each process."""
    import ray

    words = "zanzibar quokka mistral"
    text = f"{words}. The key of the red box is 4821."
    done = await cluster.client.generate(prompt=text, max_tokens=24, temperature=0.0, ignore_eos=True, request_id="told")
    with pytest.raises(InvalidRequest):
        await cluster.client.generate(prompt=text, max_tokens=10**6)
    told = [str(await cluster.client.explain("told")), str(await cluster.client.status())]
    pages = [cluster.supervisor.metrics_address, *(member.info.metrics_address for member in (await cluster.status()).members)]
    for address in pages:
        told.append((await asyncio.to_thread(urllib.request.urlopen, f"http://{address}/metrics")).read().decode())
    logs = [path for path in Path(ray._private.worker._global_node.get_session_dir_path(), "logs").rglob("*") if path.is_file()]
    told += [path.read_text(errors="replace") for path in logs]
    told += list(command_lines())
    assert len(logs) > 5 and len(pages) == 6
    assert any("joined the proxy" in one for one in told), "the members' own logs are among them"
    answer = done.text.strip()
    for one in told:
        for secret in (*words.split(), cluster.supervisor.credentials.token, *([answer] if len(answer) > 12 else [])):
            assert secret not in one, one[max(0, one.index(secret) - 300) : one.index(secret) + 100]
