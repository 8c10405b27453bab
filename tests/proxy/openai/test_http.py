"""proxy/openai/http.py and its parts through the unmodified openai client, against a real uvicorn on loopback."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from prometheus_client.parser import text_string_to_metric_families

from halfmoon.proxy.conductor.queue_order import CLASS_S, TICKS_PER_S

ANSWER = "The quick brown fox, 日本語 and 😀 jumps over the lazy dog."
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def openai_client(shared_face: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared_face.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(shared_face: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_face.http, timeout=60) as client:
        yield client


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def connected(face: Any, body: Any) -> socket.socket:
    """A bare connection on which body has been posted."""
    host, port = face.http.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def by_seed(face: Any) -> None:
    """Each seed has an answer of its own."""
    face.workers.script = lambda sequence: random.Random(sequence.sampling.seed).choices(face.answer, k=40)


# Completions


def test_what_an_answer_has_to_match_reaches_the_workers_however_it_is_asked_for(face: Any, openai_client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    as_json = json.dumps(schema, separators=(",", ":"))
    openai_client.chat.completions.create(
        model="chatty",
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
    )
    bodies: list[dict[str, Any]] = [{"guided_json": schema}, {"structured_outputs": {"json": schema}}, {"guided_json": as_json}]
    for body in bodies:
        openai_client.completions.create(model="chatty", prompt="x", extra_body=body)
    found = [(sequence.sampling.grammar.kind, sequence.sampling.grammar.text) for sequence in face.workers.requests]
    assert len(found) >= 4 and set(found) == {("json_schema", as_json)}


def test_a_model_of_pydantic_is_parsed_from_the_answer(face: Any, openai_client: openai.OpenAI, chat_tokenizer: Any) -> None:
    class Reply(pydantic.BaseModel):
        age: int
        note: str | None

    face.workers.script = lambda sequence: chat_tokenizer.encode('{"age": 3, "note": null}', add_special_tokens=False)
    reply = openai_client.chat.completions.parse(model="chatty", messages=HELLO, response_format=Reply)
    assert reply.choices[0].message.parsed == Reply(age=3, note=None)


def test_a_completion_has_text_usage_and_phases(face: Any, openai_client: openai.OpenAI) -> None:
    reply = openai_client.completions.create(model="chatty", prompt="Hello", max_tokens=100)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (ANSWER, "stop", None)
    assert reply.object == "text_completion" and reply.model == "chatty" and reply.id.startswith("cmpl-")
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    num_prompt_tokens = len(face.tokenizer.encode("Hello"))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (num_prompt_tokens, len(face.answer) + 1)
    assert reply.usage.prompt_tokens_details.cached_tokens == 4
    phases = reply.model_extra["halfmoon"]["phases"][0]  # type: ignore[index]
    assert phases["prefill_s"] == 0.75 and phases["decode_worker"] == "decode-0" and phases["ttft_s"] > 0


def test_a_streamed_completion_is_the_same_text(face: Any, openai_client: openai.OpenAI) -> None:
    stream = openai_client.completions.create(
        model="chatty", prompt="Hello", max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == len(face.answer) + 1
    assert chunks[-2].model_extra["halfmoon"]["phases"][0]["transport"] == "shm"  # type: ignore[index]
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks[:-1])


@pytest.mark.parametrize("kind", ["strings", "token ids", "lists of token ids"])
def test_prompts_come_in_every_form(kind: str, face: Any, openai_client: openai.OpenAI) -> None:
    encode = face.tokenizer.encode
    prompt: Any = {
        "strings": ["Hello", "Once upon"],
        "token ids": encode("Hello"),
        "lists of token ids": [encode("Hello"), encode("Once upon")],
    }[kind]
    reply = openai_client.completions.create(model="chatty", prompt=prompt, max_tokens=3)
    expected = [encode("Hello")] if kind == "token ids" else [encode("Hello"), encode("Once upon")]
    assert sorted(list(sequence.token_ids) for sequence in face.workers.requests) == sorted(expected)
    assert [choice.index for choice in reply.choices] == list(range(len(expected)))
    assert reply.usage is not None and reply.usage.prompt_tokens == sum(map(len, expected))
    assert reply.usage.completion_tokens == 3 * len(expected)


def test_without_max_tokens_a_completion_has_16_and_a_chat_what_is_left(face: Any, openai_client: openai.OpenAI) -> None:
    openai_client.completions.create(model="chatty", prompt="Hello")
    chat = openai_client.chat.completions.create(model="chatty", messages=HELLO)
    assert chat.usage is not None
    assert [sequence.sampling.max_tokens for sequence in face.workers.requests] == [16, 512 - chat.usage.prompt_tokens]


def test_echo_puts_the_prompt_before_the_answer(face: Any, openai_client: openai.OpenAI) -> None:
    reply = openai_client.completions.create(model="chatty", prompt=["Once", "Hello"], max_tokens=1, echo=True, n=2)
    assert [choice.text for choice in reply.choices] == ["OnceThe"] * 2 + ["HelloThe"] * 2
    stream = openai_client.completions.create(model="chatty", prompt=face.tokenizer.encode("Once"), max_tokens=1, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "OnceThe"


def test_legacy_logprobs_have_a_text_and_an_offset_for_every_token(face: Any, openai_client: openai.OpenAI) -> None:
    reply = openai_client.completions.create(model="chatty", prompt="Hello", max_tokens=5, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.text_offset is not None and logprobs.top_logprobs is not None
    assert logprobs.tokens == ["The", " quick", " brown", " fox", ","]
    assert logprobs.token_logprobs == [-0.5, -1.0, -1.5, -2.0, -2.5]
    assert logprobs.text_offset == [0, 3, 9, 15, 19]
    assert [top[token] for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True)] == logprobs.token_logprobs
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 5


# Chat


def test_a_chat_gets_the_models_template_and_an_answer(face: Any, openai_client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "go", "name": "ann"},
    ]
    reply = openai_client.chat.completions.create(model="chatty", messages=messages)
    assert reply.choices[0].message.content == ANSWER and reply.choices[0].message.role == "assistant"
    assert reply.object == "chat.completion"
    prompt = face.tokenizer.decode(list(face.workers.requests[0].token_ids), skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_streamed_chat_opens_with_the_role(face: Any, openai_client: openai.OpenAI) -> None:
    chunks = list(openai_client.chat.completions.create(model="chatty", messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_spell_the_exact_bytes(stream: bool, face: Any, openai_client: openai.OpenAI) -> None:
    reply: Any = openai_client.chat.completions.create(model="chatty", messages=HELLO, logprobs=True, top_logprobs=2, stream=stream)
    found = [chunk.choices[0].logprobs for chunk in reply] if stream else [reply.choices[0].logprobs]
    content = [token for logprobs in found if logprobs is not None for token in logprobs.content]
    assert b"".join(bytes(token.bytes) for token in content) == ANSWER.encode() + b"</s>"
    assert [token.logprob for token in content] == [-0.5 * (index + 1) for index in range(len(content))]
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].token == token.token for token in content)


def test_logprobs_without_top_logprobs_have_the_sampled_tokens_only(face: Any, openai_client: openai.OpenAI) -> None:
    reply = openai_client.chat.completions.create(model="chatty", messages=HELLO, logprobs=True, max_completion_tokens=2)
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content is not None
    assert [(token.token, token.top_logprobs) for token in reply.choices[0].logprobs.content] == [("The", []), (" quick", [])]


# Sampling


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_are_n_requests_with_seeds_in_a_row(stream: bool, face: Any, openai_client: openai.OpenAI) -> None:
    by_seed(face)
    reply: Any = openai_client.completions.create(model="chatty", prompt="Hello", n=3, seed=5, max_tokens=10, stream=stream)
    texts = ["", "", ""]
    for chunk in reply if stream else [reply]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    expected = [face.tokenizer.decode(random.Random(seed).choices(face.answer, k=40)[:10]) for seed in (5, 6, 7)]
    assert texts == expected and len(set(texts)) == 3
    assert sorted(sequence.sampling.seed for sequence in face.workers.requests) == [5, 6, 7]


def test_a_seed_gives_the_same_answer_again_and_none_gives_another(face: Any, openai_client: openai.OpenAI) -> None:
    by_seed(face)

    def answer(**options: Any) -> str:
        return openai_client.completions.create(model="chatty", prompt="Hello", max_tokens=20, **options).choices[0].text

    assert answer(seed=11) == answer(seed=11) != answer(seed=12)
    assert answer() != answer()
    answer(seed=-1)
    assert face.workers.requests[-1].sampling.seed == 2**64 - 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [" jumps over", ["never", "and 😀 j"]])
def test_a_stop_string_over_several_tokens_ends_the_answer(
    stop: Any, stream: bool, face: Any, chat_tokenizer: Any, openai_client: openai.OpenAI
) -> None:
    end = ANSWER.index(stop if isinstance(stop, str) else stop[1]) + len(stop if isinstance(stop, str) else stop[1])
    # the scripted worker is faster than any model: it must not be done before it is told to stop
    face.workers.gate_at = len(chat_tokenizer.encode(ANSWER[:end], add_special_tokens=False)) + 2
    reply: Any = openai_client.completions.create(model="chatty", prompt="Hello", max_tokens=100, stop=stop, stream=stream)
    choices = [chunk.choices[0] for chunk in (reply if stream else [reply])]
    assert "".join(choice.text for choice in choices) == ANSWER[: ANSWER.index(stop if isinstance(stop, str) else stop[1])]
    assert choices[-1].finish_reason == "stop"
    assert len(face.workers.stopped) == 1


def test_every_sampling_option_reaches_the_workers(face: Any, http: httpx.Client) -> None:
    options = {
        "temperature": 0.5,
        "top_p": 0.75,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.5,
        "seed": 3,
        "max_tokens": 9,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.25,
        "ignore_eos": True,
        "min_tokens": 2,
        "priority": -4,
        "timeout": 7.5,
        "stop_token_ids": [5, 6],
        "logit_bias": {"12": -100, "13": 1.5},
        "logprobs": 3,
        "user": "ann",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "suffix": None,
    }
    for more in ({}, options):
        assert http.post("/v1/completions", json={"model": "chatty", "prompt": "Hello"} | more).status_code == 200
    usual, sequence = face.workers.requests
    sampling = sequence.sampling
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "top_k", "min_p"):
        assert getattr(sampling, name) == options[name], name
    assert (sampling.repetition_penalty, sampling.ignore_eos, sampling.min_tokens, sampling.num_logprobs) == (1.25, True, 2, 3)
    assert list(sampling.stop_token_ids) == [5, 6] and dict(sampling.logit_bias) == {12: -100.0, 13: 1.5}
    assert 7.0 < sequence.deadline_s <= 7.5
    assert -4 * CLASS_S <= (sequence.queue_order - usual.queue_order) / TICKS_PER_S < -3 * CLASS_S


def test_a_stop_token_leaves_no_text(face: Any, openai_client: openai.OpenAI) -> None:
    comma = face.tokenizer.encode(",", add_special_tokens=False)
    face.workers.script = lambda sequence: face.answer[:5]
    reply = openai_client.completions.create(model="chatty", prompt="Hello", max_tokens=50, extra_body={"stop_token_ids": comma})
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("The quick brown fox", "stop")


# Models, health, metrics


def test_the_model_is_listed_and_found_by_name(openai_client: openai.OpenAI) -> None:
    (model,) = openai_client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("chatty", "model", "halfmoon")
    assert openai_client.models.retrieve("chatty") == model
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; 'chatty' is served"):
        openai_client.models.retrieve("other")


def test_the_process_is_alive_and_ready(face: Any, http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    ready = http.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "missing": []})


def test_the_metrics_are_prometheus_text(face: Any, http: httpx.Client) -> None:
    http.post("/v1/completions", json={"prompt": "Hello"})
    families = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{face.metrics}/metrics").text)}
    count = next(sample for sample in families["halfmoon_time_to_first_token_seconds"].samples if sample.name.endswith("_count"))
    assert count.value >= 1


def counted(face: Any, family: str, *labels: str) -> Counter[tuple[str, ...]]:
    families = {found.name: found for found in text_string_to_metric_families(httpx.get(f"{face.metrics}/metrics").text)}
    return Counter({tuple(one.labels[label] for label in labels): int(one.value) for one in families[family].samples})


def test_every_request_is_counted_by_route_and_status_and_a_path_that_is_none_leaves_no_name(face: Any, http: httpx.Client) -> None:
    labels, code = ("halfmoon_http_requests", "method", "route", "status"), ("halfmoon_refusals", "face", "code")
    http.post("/v1/completions", json={"prompt": "Hello", "top_q": 1})
    before, refused = counted(face, *labels), counted(face, *code)
    http.post("/v1/completions", json={"prompt": "Hello"})
    http.post("/v1/completions", json={"prompt": "Hello", "top_q": 1})
    http.get("/v1/models/nobody")
    http.get("/secret-of-a-client")
    found = counted(face, *labels) - before
    assert found == {
        ("POST", "/v1/completions", "200"): 1,
        ("POST", "/v1/completions", "400"): 1,
        ("GET", "/v1/models/{name:path}", "404"): 1,
        ("GET", "other", "404"): 1,
    }
    assert counted(face, *code) - refused == {("http", "invalid_request"): 2, ("http", "unknown_model"): 1}


def test_prometheus_finds_every_process_at_one_address_which_is_not_the_clients(face: Any, http: httpx.Client) -> None:
    assert (http.get("/metrics").status_code, http.get("/metrics/targets").status_code) == (404, 404)
    found = httpx.get(f"{face.metrics}/metrics/targets").json()
    assert found[0] == {
        "targets": [face.metrics.removeprefix("http://")],
        "labels": {"worker": "proxy", "role": "proxy", "model_name": "chatty"},
    }
    served = httpx.get(f"http://{found[0]['targets'][0]}/metrics").text
    assert 'halfmoon_build_info{model_name="chatty",python=' in served and 'worker="proxy"' in served


def test_tokens_wait_for_their_write_in_a_phase_of_its_own(face: Any, http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4}).json()
    (phases,) = reply["halfmoon"]["phases"]
    assert 0 < phases["write_s"] < phases["ttft_s"]


def test_a_client_s_own_request_id_is_a_label_and_the_request_s_is_ours(face: Any, http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"prompt": "Hello"}, headers={"X-Request-Id": "my-own"})
    assert reply.headers["x-request-id"] == "my-own" and reply.json()["id"] == f"cmpl-{face.workers.requests[0].request_id}"
    assert len(face.workers.requests[0].request_id) == 32
    new = http.post("/v1/completions", json={"prompt": "Hello"}).headers["x-request-id"]
    assert len(new) == 32 and face.workers.requests[1].request_id == new


# The client that leaves


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("gate_at", [0, 5])
def test_a_client_that_leaves_ends_its_request_at_once(stream: bool, gate_at: int, face: Any) -> None:
    face.workers.gate_at = gate_at
    with connected(face, {"prompt": "Hello", "max_tokens": 50, "stream": stream, "n": 2}) as connection:
        assert face.workers.arrived.wait(60)
        if stream and gate_at:
            seen = b""
            while b"brown" not in seen:
                seen += connection.recv(65536)
    # the answer is held at a gate, and the request has 600 s: nothing else ends it
    assert face.workers.cancelled.wait(60)
    while face.num_under_way:
        time.sleep(0.005)


async def test_leaving_the_openai_clients_stream_ends_the_request(face: Any) -> None:
    face.workers.gate_at = 5
    async with openai.AsyncOpenAI(base_url=f"{face.http}/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(model="chatty", prompt="Hello", stream=True)
        async for _ in stream:
            break
        await stream.close()
        assert await asyncio.to_thread(face.workers.cancelled.wait, 60)


def test_a_logprob_of_minus_infinity_is_json(face: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face.workers, "logprob", lambda index: float("-inf"))
    for path, body in (
        ("/v1/completions", {"prompt": "x", "logprobs": 1}),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 1}),
    ):
        reply = http.post(path, json=body | {"max_tokens": 2})
        assert reply.status_code == 200 and reply.text.count("-9999.0") == 4


def test_the_openapi_description_names_the_fields(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    assert {"prompt", "echo", "top_k"} <= schemas["CompletionBody"]["properties"].keys()


def test_time_to_first_token_counts_from_the_request_s_head_and_not_from_when_its_body_was_read(face: Any) -> None:
    body = json.dumps({"model": "chatty", "prompt": "Hello", "max_tokens": 100}).encode()

    host, port = face.http.removeprefix("http://").split(":")
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\nConnection: close\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 "), "the head is there, and the body is asked for"
        time.sleep(0.4)  # the client's own line
        connection.sendall(body)
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["halfmoon"]["phases"][0]["ttft_s"] > 0.4
