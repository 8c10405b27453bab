"""Anthropic's messages, by the unmodified anthropic client: a model of Qwen3's form whose answers are the test's script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import message_count_tokens_params, message_create_params

from halfmoon.protocol.errors import InternalError, Overloaded, RateLimited
from halfmoon.proxy.openai.messages.bodies import IGNORED, REFUSED, CountTokensBody, MessagesBody
from halfmoon.proxy.openai.messages.errors import messages_error, messages_status
from halfmoon.proxy.tenants.keys_file import KeysFile
from halfmoon.proxy.text.tokenizer import Tokenizer

MESSAGES = "/v1/messages"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ADD_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD: Any = {"name": "add", "description": "Adds.", "input_schema": ADD_SCHEMA, "cache_control": {"type": "ephemeral"}}
NOW: Any = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
SUM = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
BOTH = f'{SUM}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
ASKED: dict[str, Any] = {"model": "caller", "max_tokens": 200, "messages": HELLO}
NUM_CACHED = 4  # of every prompt, by the scripted workers


@pytest.fixture
def face(caller: Any) -> Any:
    caller.reset()
    return caller


@pytest.fixture(scope="module")
def client(caller: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=caller.http, api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def http(caller: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=caller.http, timeout=60) as found:
        yield found


def tokens_of(face: Any, text: str) -> list[int]:
    return face.tokenizer.encode(text, add_special_tokens=False)


def prompt_of(face: Any) -> str:
    return face.tokenizer.decode(list(face.workers.requests[-1].token_ids), skip_special_tokens=False)


def refused(http: httpx.Client, **fields: Any) -> str:
    reply = http.post(MESSAGES, json=ASKED | fields)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error", reply.text
    return reply.json()["error"]["message"]


def events_of(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """Each with its name, which is its type, too."""
    found: list[dict[str, Any]] = []
    reply = http.post(MESSAGES, json=ASKED | {"stream": True} | fields)
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    for event in reply.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


# Answers


def test_an_answer_is_a_message_of_a_text_block(face: Any, client: Any) -> None:
    face.says("Hello there.")
    message = client.messages.create(**ASKED)
    assert [(block.type, block.text) for block in message.content] == [("text", "Hello there.")]
    assert (message.type, message.role, message.model, message.stop_reason) == ("message", "assistant", "caller", "end_turn")
    num_prompt = len(face.workers.requests[-1].token_ids)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (num_prompt - NUM_CACHED, NUM_CACHED)
    assert message.usage.output_tokens == len(tokens_of(face, "Hello there.")) + 1
    assert message._request_id and message.id == f"msg_{face.workers.requests[-1].request_id}"


def test_reasoning_and_calls_are_blocks_in_their_order(face: Any, client: Any) -> None:
    face.says(f"<think>\nTwo calls.\n</think>\n\nI add.\n{BOTH}")
    message = client.messages.create(**ASKED, tools=[ADD, NOW])
    thinking, text, add, now = message.content
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "Two calls.", "I add.\n")
    assert (add.type, add.name, add.input, now.name, now.input) == ("tool_use", "add", {"a": 1, "b": 2}, "now", {})
    assert message.stop_reason == "tool_use" and add.id != now.id


def test_a_stream_put_together_by_the_client_is_the_whole_message(face: Any, client: Any) -> None:
    face.says(f"<think>\nTwo calls.\n</think>\n\nI add.\n{BOTH}")
    whole = client.messages.create(**ASKED, tools=[ADD, NOW])
    with client.messages.stream(**ASKED, tools=[ADD, NOW]) as stream:
        streamed = stream.get_final_message()

    def told(message: Any) -> Any:
        return message.model_dump(exclude={"id": True, "content": {"__all__": {"id", "parsed_output"}}})

    assert told(streamed) == told(whole)


def test_events_come_in_anthropic_s_order_and_while_the_answer_goes_on(face: Any, client: Any) -> None:
    face.says(f"I add.\n{SUM}")
    # the rest of the answer waits until the client has seen a piece of the arguments
    face.workers.gate_at = len(tokens_of(face, f"I add.\n{SUM[: SUM.index('2}')]}"))
    kinds: list[str] = []
    for event in client.messages.create(**ASKED, tools=[ADD], stream=True):
        kind = event.delta.type if event.type == "content_block_delta" else event.type
        if not kinds or kinds[-1] != kind:
            kinds.append(kind)
        if kind == "input_json_delta":
            face.open_gate()
    block = ["content_block_start", "text_delta", "content_block_stop"]
    call = ["content_block_start", "input_json_delta", "content_block_stop"]
    assert kinds == ["message_start", *block, *call, "message_delta", "message_stop"]


def test_blocks_are_numbered_and_the_last_delta_has_reason_and_usage(face: Any, http: httpx.Client) -> None:
    face.says(f"I add.\n{BOTH}")
    start, *events, delta, stop = events_of(http, tools=[ADD, NOW])
    assert start["message"]["content"] == [] and start["message"]["stop_reason"] is None
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1, 2]
    assert {event["index"] for event in events if event["type"] == "content_block_delta"} == {0, 1, 2}
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None} and stop == {"type": "message_stop"}
    usage = delta["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == start["message"]["usage"]["input_tokens"]
    assert usage["output_tokens"] == len(tokens_of(face, f"I add.\n{BOTH}")) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_and_max_tokens_are_told_apart(stream: bool, face: Any, client: Any, http: httpx.Client) -> None:
    face.says("Once upon a time")
    asked = {"stop_sequences": ["upon", "never"]}, {"max_tokens": 3}
    if stream:
        ends = [events_of(http, **fields)[-2]["delta"] for fields in asked]
    else:
        ends = [http.post(MESSAGES, json=ASKED | fields).json() for fields in asked]
    assert [(end["stop_reason"], end["stop_sequence"]) for end in ends] == [("stop_sequence", "upon"), ("max_tokens", None)]


def test_a_call_that_a_stop_sequence_cut_off_is_not_to_be_run(face: Any, client: Any) -> None:
    face.says(SUM)
    message = client.messages.create(**ASKED, tools=[ADD], stop_sequences=["2}"])
    assert (message.stop_reason, message.stop_sequence, message.content[0].type) == ("stop_sequence", "2}", "tool_use")


def test_a_call_that_is_cut_off_has_no_input(face: Any, client: Any) -> None:
    face.says(SUM)
    num_tokens = len(tokens_of(face, SUM[: SUM.index("2}")]))
    message = client.messages.create(**ASKED | {"max_tokens": num_tokens}, tools=[ADD])
    assert (message.stop_reason, message.content[0].name, message.content[0].input) == ("max_tokens", "add", {})


# Prompts


def test_a_loop_of_calls_and_results_goes_on(face: Any, client: Any) -> None:
    face.says(f"<think>\nHm.\n</think>\n\nI add.\n{SUM}", "It is 3.")
    messages = [*HELLO]
    message = client.messages.create(**ASKED, tools=[ADD])
    call = message.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": str(sum(call.input.values()))}]}
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    last = client.messages.create(**ASKED | {"messages": messages}, tools=[ADD])
    assert last.content[0].text == "It is 3."
    prompt = prompt_of(face)
    assert f"<think>\nHm.\n</think>\n\nI add.\n\n{SUM}<|im_end|>" in prompt
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n" in prompt


def test_a_failed_call_says_so_and_text_beside_results_is_a_turn_of_its_own(face: Any, http: httpx.Client) -> None:
    called = {"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}
    results = [
        {"type": "tool_result", "tool_use_id": "t", "content": "no b", "is_error": True},
        {"type": "text", "text": "Try", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "again."},
    ]
    history = [*HELLO, {"role": "assistant", "content": [called]}, {"role": "user", "content": results}]
    assert http.post(MESSAGES, json=ASKED | {"messages": history}).status_code == 200
    assert "<tool_response>\nError: no b\n</tool_response><|im_end|>\n<|im_start|>user\nTry\nagain.<|im_end|>" in prompt_of(face)


def test_system_is_the_first_message_and_neighbours_of_a_role_are_one_turn(face: Any, http: httpx.Client) -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Be kind."}]
    http.post(MESSAGES, json=ASKED | {"system": system, "messages": [*HELLO, {"role": "user", "content": "again"}]})
    told = "<|im_start|>system\nBe brief.\nBe kind.<|im_end|>\n<|im_start|>user\nHello\nagain<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(face).endswith(told)


def test_an_assistant_s_last_message_is_continued(face: Any, http: httpx.Client) -> None:
    http.post(MESSAGES, json=ASKED | {"messages": [*HELLO, {"role": "assistant", "content": "The answer is"}]})
    assert prompt_of(face).endswith("<|im_start|>assistant\nThe answer is")


@pytest.mark.parametrize(("thinking", "is_off"), [({"type": "disabled"}, True), ({"type": "enabled", "budget_tokens": 1024}, False)])
def test_thinking_is_the_template_s_switch(thinking: Any, is_off: bool, face: Any, client: Any) -> None:
    client.messages.create(**ASKED, thinking=thinking)
    assert prompt_of(face).endswith("<think>\n\n</think>\n\n") == is_off


@pytest.mark.parametrize(
    ("choice", "held"), [({"type": "auto"}, None), ({"type": "any"}, {"add", "now"}), ({"type": "tool", "name": "now"}, {"now"})]
)
def test_tool_choice_is_held_by_a_grammar(choice: Any, held: set[str] | None, face: Any, client: Any) -> None:
    client.messages.create(**ASKED, tools=[ADD, NOW], tool_choice=choice)
    sampling = face.workers.requests[-1].sampling
    assert sampling.HasField("grammar") == (held is not None)
    if held is not None:
        assert {name for name in ("add", "now") if f'"{name}' in sampling.grammar.text.replace('\\"', '"')} == held
    assert '"name": "add", "description": "Adds."' in prompt_of(face)


def test_tool_choice_none_hides_the_tools_and_one_call_is_one(face: Any, client: Any) -> None:
    client.messages.create(**ASKED, tools=[ADD], tool_choice={"type": "none"})
    assert "Adds." not in prompt_of(face)
    face.says(BOTH)
    message = client.messages.create(**ASKED, tools=[ADD, NOW], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.name for block in message.content] == ["add"]


def test_sampling_and_the_format_of_the_answer_reach_the_workers(face: Any, client: Any) -> None:
    form = {"format": {"type": "json_schema", "schema": ADD_SCHEMA}}
    client.messages.create(**ASKED, output_config=form, extra_body={"temperature": 0.5, "top_p": 0.25, "top_k": 7})
    sampling = face.workers.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.25, 7, 200)
    assert sampling.HasField("grammar")


@pytest.mark.parametrize("more", [{}, {"tools": [ADD], "system": "Be brief."}, {"thinking": {"type": "disabled"}}])
def test_count_tokens_counts_what_a_message_has(more: Any, face: Any, client: Any) -> None:
    counted = client.messages.count_tokens(model="caller", messages=HELLO, **more)
    client.messages.create(**ASKED, **more)
    assert counted.input_tokens == len(face.workers.requests[-1].token_ids)


def test_a_large_body_is_read_like_a_small_one(face: Any, http: httpx.Client) -> None:
    """Another process parses it. What makes it large is dropped there, so that the prompt fits."""
    large = {"metadata": {"user_id": "x" * 2**19}, "system": "Be brief.", "tools": [ADD]}
    assert http.post(MESSAGES, json=ASKED | large).status_code == 200
    seen = prompt_of(face)
    http.post(MESSAGES, json=ASKED | {"system": "Be brief.", "tools": [ADD]})
    assert "Be brief." in seen and seen == prompt_of(face)


# Errors


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0] is of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "content[0].tool_use_id is 'x'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]}, "content[0].id is missing"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]}, "nothing follows"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]}, "'web_search_20250305'"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
        ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "tools[0].name is 'a b'"),
        ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "tools[0].input_schema: its type is 'string'"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice names 'g'"),
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({"tools": [ADD], "tool_choice": "auto"}, "tool_choice is 'auto'"),
        ({"stop_sequences": [""]}, "stop_sequences has an empty string"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers is not supported"),
        ({"stop_sequence": ["a"]}, "did you mean stop_sequences?"),
        ({"messages": [{"role": "user", "content": "x" * 40000}]}, "prompt is too long: "),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format is {'type': 'xml'}"),
    ],
)
def test_what_is_wrong_is_named_in_anthropic_s_form(fields: dict[str, Any], told: str, http: httpx.Client) -> None:
    assert told in refused(http, **fields)


def test_max_tokens_is_required(http: httpx.Client) -> None:
    reply = http.post(MESSAGES, json={"model": "caller", "messages": HELLO})
    assert reply.status_code == 400
    assert reply.json() == {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens is missing"}}


def test_errors_have_the_types_that_the_client_has_classes_for(face: Any, client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as found:
        client.messages.create(**ASKED | {"model": "other"})
    bodies: list[Any] = [found.value.body]
    assert found.value.request_id
    face.workers.fail_at = {0: InternalError("broken")}
    with pytest.raises(anthropic.InternalServerError) as failed:
        client.messages.create(**ASKED)
    bodies.append(failed.value.body)
    assert [body["error"]["type"] for body in bodies] == ["not_found_error", "api_error"]


def test_paths_below_and_other_methods_are_refused_in_the_same_form(http: httpx.Client) -> None:
    none, other = http.post(f"{MESSAGES}/batches", json={}), http.get(MESSAGES)
    assert (none.status_code, none.json()["error"]["type"]) == (404, "not_found_error")
    assert (other.status_code, other.json()["error"]["type"]) == (405, "invalid_request_error")


def test_a_cluster_without_room_is_overloaded_and_a_tenant_over_its_limit_is_limited() -> None:
    found = [(messages_status(error), messages_error(error)["error"]["type"]) for error in (Overloaded("full"), RateLimited("over"))]
    assert found == [(529, "overloaded_error"), (429, "rate_limit_error")]


def test_an_error_in_a_stream_is_an_event(face: Any, http: httpx.Client) -> None:
    face.says("Once upon a time")
    face.workers.fail_at = {2: InternalError("broken")}
    *_, last = events_of(http)
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")


def test_who_leaves_a_stream_cancels_the_answer(face: Any, client: Any) -> None:
    face.says("Once upon a time")
    face.workers.gate_at = 2
    with client.messages.create(**ASKED, stream=True) as stream:
        assert next(iter(stream)).type == "message_start"
    assert face.workers.cancelled.wait(60)


def test_a_key_may_come_as_x_api_key_or_as_bearer(make_face: Callable[..., Any], caller_folder: Path, tmp_path: Path) -> None:
    file, key = KeysFile({}, {}).with_key("first", {})
    file.save(tmp_path / "keys.json")
    guarded = make_face(caller_folder, Tokenizer.from_folder(caller_folder), keys_file=str(tmp_path / "keys.json"))
    options: Any = {"base_url": guarded.http, "max_retries": 0}
    credentials: list[Any] = [{"api_key": key}, {"auth_token": key}]
    for given in credentials:
        with anthropic.Anthropic(**options, **given) as asking:
            assert asking.messages.create(**ASKED).stop_reason == "end_turn"
            assert asking.messages.count_tokens(model="caller", messages=HELLO).input_tokens > 0
    told = [
        httpx.post(f"{guarded.http}{MESSAGES}", json=ASKED, headers=headers, timeout=60).status_code
        for headers in ({"x-api-key": key}, {"x-api-key": "wrong"}, {})
    ]
    assert told == [200, 401, 401]
    with anthropic.Anthropic(**options, api_key="wrong") as asking, pytest.raises(anthropic.AuthenticationError) as found:
        asking.messages.create(**ASKED)
    body: Any = found.value.body
    assert body["error"]["type"] == "authentication_error"


# Fields


def test_every_status_and_the_events_are_described(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    found = paths[MESSAGES]["post"]["responses"]
    assert set(found) == {"200", "400", "404", "405", "408", "413", "415", "429", "431", "500", "503", "504", "529"}
    assert set(found["200"]["content"]) == {"application/json", "text/event-stream"}
    assert f"{MESSAGES}/count_tokens" in paths


@pytest.mark.parametrize(
    ("params", "body"),
    [
        (message_create_params.MessageCreateParamsStreaming, MessagesBody),
        (message_count_tokens_params.MessageCountTokensParams, CountTokensBody),
    ],
)
def test_every_field_that_anthropic_publishes_is_served_ignored_or_refused(params: Any, body: Any) -> None:
    published = {name for kind in (params, *params.__orig_bases__) for name in getattr(kind, "__annotations__", ())}
    assert published - IGNORED - REFUSED == body.model_fields.keys() - ({"temperature", "top_p", "top_k"} - published)


def test_what_is_ignored_changes_nothing(face: Any, http: httpx.Client) -> None:
    assert http.post(MESSAGES, json=ASKED | {name: {"a": "b"} for name in IGNORED} | {"container": None}).status_code == 200
