"""proxy/openai/errors.py: everything that can be wrong, through the unmodified openai client and plain HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from halfmoon.protocol.config import ProxyConfig
from halfmoon.protocol.errors import HandoffCorrupt, StoreFull
from halfmoon.proxy.openai import body as openai_body
from halfmoon.proxy.openai.types import ChatBody, CompletionBody

MAX_BODY_BYTES = ProxyConfig().max_body_bytes
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


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


def error_of(reply: httpx.Response) -> dict[str, Any]:
    assert reply.headers["content-type"] == "application/json"
    (key,) = reply.json()
    assert key == "error" and reply.json()["error"].keys() == {"message", "type", "param", "code"}
    return reply.json()["error"]


CHAT = "/v1/chat/completions"
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/completions", {}, "prompt", "prompt is missing"),
    ("/v1/completions", {"prompt": 3}, "prompt", "prompt is 3; it must be a string, a list of strings"),
    ("/v1/completions", {"prompt": [["a"]]}, "prompt", "it must be a string"),
    ("/v1/completions", {"prompt": []}, "prompt", "there is no prompt"),
    ("/v1/completions", {"prompt": [[]]}, "prompt", "the prompt is empty"),
    ("/v1/completions", {"prompt": [1, 400]}, "prompt", r"token id 400; this model's are at least 0 and at most \d+"),
    ("/v1/completions", {"prompt": [-1]}, "prompt", "token id -1"),
    ("/v1/completions", {"prompt": [5] * 512}, "prompt", "maximum context length is 512 .* has 512 tokens and may have 511"),
    ("/v1/completions", {"prompt": [5] * 500, "max_tokens": 13}, "max_tokens", "500 tokens and max_tokens is 13, so max_tokens may be 12"),
    ("/v1/completions", {"prompt": "x\ud800"}, "prompt", "surrogate"),
    ("/v1/completions", {"prompt": "x", "max_tokens": "5"}, "max_tokens", "max_tokens is '5': input should be a valid integer"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}, "temperature", "temperature is 'hot'"),
    ("/v1/completions", {"prompt": "x", "temperature": -0.5}, "temperature", "temperature is -0.5; it must be at least 0"),
    ("/v1/completions", {"prompt": "x", "temperature": float("nan")}, "temperature", "temperature is nan"),
    ("/v1/completions", {"prompt": "x", "timeout": float("inf")}, "timeout", "timeout is inf; it must be a number of seconds"),
    ("/v1/completions", {"prompt": "x", "timeout": 1e18}, "timeout", r"timeout is 1e\+18; it must be .* at most 604800 \(7 days\)"),
    ("/v1/completions", {"prompt": "x", "top_p": 0}, "top_p", "above 0"),
    ("/v1/completions", {"prompt": "x", "top_p": 1e-300}, "top_p", "top_p is 1e-300, which is 0.0 in fp32; it must be above 0"),
    ("/v1/completions", {"prompt": "x", "top_p": 1e-46}, "top_p", "0.0 in fp32"),
    ("/v1/completions", {"prompt": "x", "repetition_penalty": 1e-300, "top_p": 0.9}, "repetition_penalty", "at least 0.01"),
    ("/v1/completions", {"prompt": "x", "repetition_penalty": 1e-38}, "repetition_penalty", "at least 0.01"),
    ("/v1/completions", {"prompt": "x", "n": 0}, "n", "n is 0; it must be at least 1 and at most 128"),
    ("/v1/completions", {"prompt": "x", "n": True}, "n", "n is True"),
    ("/v1/completions", {"prompt": "x", "logprobs": 21}, "logprobs", "^logprobs is 21; it must be at least 0"),
    ("/v1/completions", {"prompt": "x", "prompt_logprobs": -1, "echo": True, "logprobs": 2}, "prompt_logprobs", "^prompt_logprobs is -1"),
    (CHAT, {"messages": HELLO, "prompt_logprobs": 21}, "prompt_logprobs", "^prompt_logprobs is 21; it must be at least 0 and at most 20"),
    (
        "/v1/completions",
        {"prompt": [[5] * 400] * 150, "echo": True, "logprobs": 20},
        "prompt_logprobs",
        "1260000 log probabilities of prompt tokens, and a reply has at most 1048576",
    ),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "^max_tokens is 0; it must be at least 1"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 0}, "max_tokens", "^max_tokens is 0; it must be at least 1"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported"),
    ("/v1/completions", {"prompt": "x", "best_of": 3}, "best_of", "best_of is 3"),
    ("/v1/completions", {"prompt": "x", "temprature": 1}, "temprature", "not a known field; did you mean temperature"),
    ("/v1/completions", {"prompt": "x", "stop": 3}, "stop", "stop is 3; it must be a string or a list of strings"),
    ("/v1/completions", {"prompt": "x", "stop": [""]}, "stop", "empty string"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "has the key 'a'"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"400": 1}}, "logit_bias", "token id 400"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [400]}, "stop_token_ids", "token id 400"),
    ("/v1/completions", {"prompt": "x", "priority": 2**31}, "priority", "32 bits"),
    ("/v1/completions", {"prompt": "x", "seed": 2**64}, "seed", "at most"),
    ("/v1/completions", {"prompt": "x", "stream_options": {}}, "stream_options", "needs stream"),
    ("/v1/completions", {"prompt": "x", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "extra inputs"),
    (CHAT, {"messages": []}, "messages", "messages is empty"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "has no content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "is of type 'image_url'"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function", "is missing"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
        "messages[0].tool_calls[0].function.arguments",
        "is 5",
    ),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "is missing"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0]", "must be of type 'function', and have one"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type", "'xml'; it must be text, json_object"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format.json_schema", "with a schema"),
    (CHAT, {"messages": HELLO, "guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "send one of them"),
    (CHAT, {"messages": HELLO, "guided_choice": []}, "response_format", "list of strings that are not empty"),
    (CHAT, {"messages": HELLO, "guided_json": "{"}, "response_format", "is not JSON"),
    (CHAT, {"messages": HELLO, "guided_regex": "a{1,99999999}"}, "response_format", "repeats something 99999999 times"),
    (CHAT, {"messages": HELLO, "structured_outputs": {"lark": "x"}}, "structured_outputs.lark", "may have json, regex"),
    ("/v1/completions", {"prompt": "x", "ignore_eos": True, "guided_regex": "a"}, "ignore_eos", "ends with its grammar"),
    (CHAT, {"messages": HELLO, "modalities": ["audio"]}, "modalities", "not supported"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "^top_logprobs is 21"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "maximum context length is 512"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), WRONG)
def test_a_wrong_request_is_a_400_that_names_the_field(
    path: str, body: dict[str, Any], param: str, message: str, face: Any, http: httpx.Client
) -> None:
    # by hand: httpx's own JSON refuses NaN and half surrogates, which is what is to be sent
    reply = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    error = error_of(reply)
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert re.search(message, error["message"]), error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 300
    assert face.workers.requests == []


def test_a_harmless_value_of_an_unsupported_field_is_accepted(face: Any, http: httpx.Client) -> None:
    harmless = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "audio": None}
    assert http.post(CHAT, json={"messages": HELLO} | harmless).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"prompt": ', "application/json", "the body is not JSON: Expecting value at character 11"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b"", "application/json", "must be a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(content: bytes, kind: str, message: str, http: httpx.Client) -> None:
    reply = http.post("/v1/completions", content=content, headers={"content-type": kind})
    assert reply.status_code == 400 and message in error_of(reply)["message"]


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {}, {"content-type": "application/json", "content-encoding": "br"}])
def test_a_body_of_another_type_is_a_415_that_names_the_right_one(headers: dict[str, str], http: httpx.Client) -> None:
    reply = http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert reply.status_code == 415
    assert ("uncompressed" if "content-encoding" in headers else "content-type: application/json") in error_of(reply)["message"]


@pytest.mark.parametrize("told", [True, False])
def test_a_body_over_the_limit_is_a_413_that_names_it(told: bool, face: Any, http: httpx.Client) -> None:
    content = json.dumps({"prompt": "x" * MAX_BODY_BYTES}).encode()
    parts = iter([content]) if not told else content
    reply = http.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
    what = f"{len(content)} bytes" if told else "more bytes"
    assert reply.status_code == 413
    assert error_of(reply)["message"] == f"the body has {what}; it may have 16777216 (16 MiB)"
    assert http.get("/health").status_code == 200


LARGE: list[tuple[str, str, bytes]] = [
    ("/v1/completions", "prompt", json.dumps({"prompt": [5] * 1_000_000}).encode()),
    ("/v1/completions", "prompt", json.dumps({"prompt": [[5] * 100_000] * 10}).encode()),
    (CHAT, "messages", json.dumps({"messages": [{"role": "user", "content": "xx"}] * 2**16}).encode()),
]


@pytest.mark.parametrize(("path", "param", "content"), LARGE)
def test_a_large_body_is_parsed_while_the_event_loop_turns(
    path: str, param: str, content: bytes, face: Any, http: httpx.Client, loop_gap: Any
) -> None:
    began = time.process_time()
    openai_body._parse(ChatBody if path == CHAT else CompletionBody, content)
    alone_s, gaps_s = time.process_time() - began, []
    for _ in range(3):
        with loop_gap(face._loop) as gap:
            reply = http.post(path, content=content, headers={"content-type": "application/json"})
        gaps_s.append(gap.longest_s)
        assert reply.status_code == 400 and error_of(reply)["param"] == param
    assert min(gaps_s) < alone_s / 2, f"{gaps_s} of {alone_s:.3f} s"


@pytest.mark.parametrize("prompt", ["word " * 3_000_000, ["word " * 20_000] * 128, ["a"] * 3000])
def test_a_body_of_long_texts_is_refused_for_what_is_wrong_with_it(prompt: Any, http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"prompt": prompt, "n": 128 if len(prompt) == 3000 else 1})
    assert reply.status_code == 400 and error_of(reply)["param"] == "prompt"


@pytest.mark.parametrize("wrong", [-1, 2**32, 2**70])
def test_a_token_id_that_no_model_has_is_named_in_a_large_body_too(wrong: int, http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"prompt": [5, wrong], "user": "x" * 400_000})
    assert error_of(reply)["message"].startswith(f"prompt has token id {wrong}; this model's are at least 0")


ODD: list[tuple[bytes, str]] = [
    (b'{"prompt": ' + b"[" * 100_000, "nested too deep"),
    (b'{"prompt": "\xff"}', "byte 12 is no UTF-8"),
    (b'{"prompt": [' + b"1" * 5000 + b"]}", "not JSON: Exceeds the limit"),
    (b'{"prompt": [' + b"[]," * 5000 + b"[]]}", "there are 5001 prompts; a request may have 2048"),
    (b'{"prompt": [' + b"1," * 500_000 + b'"a"]}', "it must be a string, a list of strings"),
    (json.dumps({f"x{index}": 1 for index in range(101)}).encode(), "the body has 101 fields; it may have 100"),
    (json.dumps({"prompt": "x", "x" * 1_000_000: 1}).encode(), "is not a known field"),
    (json.dumps({"prompt": "x", "x" * 100_000: 1}).encode(), "is not a known field"),
    (json.dumps({"prompt": "x", "stream_options": {"x" * 100_000: 1}}).encode(), "stream_options.xxx"),
    (json.dumps({"prompt": "x", "logit_bias": {"x" * 100_000: 1}}).encode(), "logit_bias has the key"),
    (json.dumps({"logit_bias": {str(index): 1 for index in range(1025)}}).encode(), "logit_bias has 1025 items; it may have 1024"),
]


@pytest.mark.parametrize(("content", "message"), ODD)
def test_an_odd_body_is_a_400_in_few_words(content: bytes, message: str, face: Any, http: httpx.Client) -> None:
    reply = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and message in error_of(reply)["message"], reply.text[:300]
    assert len(reply.text) < 400 and face.workers.requests == []


def test_an_unknown_route_is_a_404_and_a_wrong_method_a_405_in_openais_shape(http: httpx.Client) -> None:
    missing, wrong = http.get("/v1/engines"), http.get("/v1/completions")
    assert missing.status_code == 404 and "no route /v1/engines" in error_of(missing)["message"]
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert error_of(wrong)["message"] == "/v1/completions does not take GET; use POST"


def test_a_wrong_request_arrives_as_bad_request_error(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.completions.create(model="chatty", prompt="x", temperature=101)
    assert (caught.value.param, caught.value.code, caught.value.type) == ("temperature", "invalid_request", "invalid_request_error")


def test_an_unknown_model_is_named_in_few_words(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"prompt": "x", "model": "\u20ac" * 100_000})
    assert reply.status_code == 404 and len(reply.text) < 400 and "does not exist" in error_of(reply)["message"]


def test_an_unknown_model_arrives_as_not_found_error(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.chat.completions.create(model="gpt-7", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_overloaded_proxy_answers_429_with_retry_after(make_face: Callable[..., Any]) -> None:
    face = make_face(max_queued_requests=1)
    face.workers.gate_at = 0
    with openai.OpenAI(base_url=f"{face.http}/v1", api_key="none", max_retries=0) as client:
        with held_request(face):
            assert face.workers.arrived.wait(60)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model="chatty", prompt="x")
            assert caught.value.code == "overloaded" and int(caught.value.response.headers["retry-after"]) >= 1
            assert "x-request-id" in caught.value.response.headers
            # n choices are admitted together or not at all
            face.open_gate()
        face.reset()
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="chatty", prompt="x", n=2)
        while face.num_under_way:
            time.sleep(0.005)


@contextlib.contextmanager
def held_request(face: Any) -> Iterator[None]:
    """A request that waits for its answer while the test goes on."""
    with connected(face, {"prompt": "x"}) as connection:
        yield
        assert connection.recv(65536)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_own_status(stream: bool, face: Any, http: httpx.Client) -> None:
    face.workers.fail_at = {0: HandoffCorrupt("block 3 does not match its checksum")}
    reply = http.post("/v1/completions", json={"prompt": "x", "stream": stream})
    assert reply.status_code in (500, 503) and error_of(reply)["type"] == "server_error"
    assert "checksum" in error_of(reply)["message"]


@pytest.mark.parametrize("n", [1, 2])
def test_an_error_amid_a_stream_is_an_event_in_openais_shape(n: int, face: Any, http: httpx.Client, openai_client: openai.OpenAI) -> None:
    face.workers.fail_at = {3: StoreFull("no page is free")}
    reply = http.post("/v1/completions", json={"prompt": "x", "stream": True, "n": n})
    assert reply.status_code == 200
    *_, before, last = events(reply)
    assert "choices" in before and last["error"]["type"] == "server_error" and last["error"].keys() == {"message", "type", "param", "code"}
    with pytest.raises(openai.APIError, match=r"no page is free|nothing to replay"):
        list(openai_client.completions.create(model="chatty", prompt="x", stream=True, n=n))


def test_a_bug_amid_a_stream_is_an_event_too(face: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def push(self: Any, text: str) -> str:
        if "brown" in text:
            raise ZeroDivisionError("a bug")
        return text

    monkeypatch.setattr("halfmoon.proxy.requests.choice_text.StopStrings.push", push)
    *_, last = events(http.post("/v1/completions", json={"prompt": "x", "stream": True}))
    assert last["error"]["code"] == "internal_error" and "ZeroDivisionError" in last["error"]["message"]


def test_a_client_that_leaves_before_its_body_has_come_is_no_error(face: Any, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    host, port = face.http.removeprefix("http://").split(":")
    for path in ("/v1/completions", CHAT):
        for sent in (b"", b"{"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode() + sent)
                http.get("/health")  # it has been read by now
    for _ in range(3):
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
