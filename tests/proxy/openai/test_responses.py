"""/v1/responses by the unmodified openai client: a model of Qwen3's form whose answers are the test's script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from halfmoon.protocol.errors import StoreFull
from halfmoon.proxy.openai.responses_described import ResponseReply

PATH = "/v1/responses"
ADD_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD = {"type": "function", "name": "add", "description": "Adds.", "parameters": ADD_SCHEMA, "strict": None}
TOOLS: list[Any] = [ADD, {"type": "function", "name": "now"}]
SUM = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"
ALL = f"{THOUGHT}I add.\n{SUM}"
DELTAS = {"response.output_text.delta": "message", "response.reasoning_text.delta": "reasoning"} | {
    "response.function_call_arguments.delta": "function_call"
}


@pytest.fixture
def face(caller: Any) -> Any:
    caller.reset()
    return caller


@pytest.fixture(scope="module")
def client(caller: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{caller.http}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def http(caller: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=caller.http, timeout=60) as found:
        yield found


def num_tokens(face: Any, text: str) -> int:
    return len(face.tokenizer.encode(text, add_special_tokens=False))


def prompt_of(face: Any) -> str:
    return face.tokenizer.decode(list(face.workers.requests[-1].token_ids), skip_special_tokens=False)


def refused(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = http.post(PATH, json={"input": "Hello", **fields})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def events_of(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    with http.stream("POST", PATH, json={"input": "Hello", "stream": True, **fields}) as reply:
        lines = [line for line in reply.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [event["type"] for event in events]
    return events


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in output]


# Whole replies


def test_a_string_is_answered(face: Any, client: openai.OpenAI) -> None:
    face.says("Hello there")
    reply = client.responses.create(model="caller", input="Hello", instructions="Be kind.", metadata={"a": "b"}, temperature=0.5)
    assert (reply.output_text, reply.status, reply.error, reply.incomplete_details) == ("Hello there", "completed", None, None)
    assert (reply.instructions, reply.metadata, reply.temperature, reply.model) == ("Be kind.", {"a": "b"}, 0.5, "caller")
    assert prompt_of(face).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>")
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (
        len(face.workers.requests[-1].token_ids),
        num_tokens(face, "Hello there") + 1,
    )
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply.usage.input_tokens_details.cached_tokens >= 0 and reply.usage.output_tokens_details.reasoning_tokens == 0


def test_reasoning_text_and_calls_are_items_of_their_own(face: Any, http: httpx.Client) -> None:
    face.says(ALL)
    reply = http.post(PATH, json={"input": "Hello", "tools": TOOLS})
    found = Response.model_validate(reply.json())  # the openai package's own types, strictly
    ResponseReply.model_validate(reply.json())  # and what openapi.json says
    thought, said, call = found.output
    assert thought.type == "reasoning" and [part.text for part in thought.content or []] == ["Hm."]
    assert said.type == "message" and found.output_text == "I add.\n"
    assert call.type == "function_call" and (call.name, json.loads(call.arguments)) == ("add", {"a": 1, "b": 2})
    assert call.call_id.startswith("call_") and call.status == "completed"
    assert reply.json()["tools"][0] == ADD and reply.headers["x-request-id"] == reply.json()["id"].removeprefix("resp_")
    assert found.usage is not None and 0 < found.usage.output_tokens_details.reasoning_tokens <= num_tokens(face, THOUGHT)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_is_incomplete(stream: bool, face: Any, http: httpx.Client) -> None:
    face.says(SUM)
    fields = {"tools": TOOLS, "max_output_tokens": num_tokens(face, SUM[: SUM.index("2}")])}
    if stream:
        *_, last = events_of(http, **fields)
        assert last["type"] == "response.incomplete"
        reply = last["response"]
    else:
        reply = http.post(PATH, json={"input": "Hello", **fields}).json()
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (call,) = reply["output"]
    assert call["status"] == "incomplete" and call["arguments"].startswith('{"a": 1')


# Streams


def test_a_stream_s_events_tell_what_the_whole_reply_has(face: Any, http: httpx.Client) -> None:
    face.says(ALL)
    whole = http.post(PATH, json={"input": "Hello", "tools": TOOLS}).json()
    events = events_of(http, tools=TOOLS)
    for event in events:
        pydantic.TypeAdapter(ResponseStreamEvent).validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed" and events[0]["response"]["id"] == events[-1]["response"]["id"]
    items: list[dict[str, Any]] = []
    texts: dict[int, str] = {}
    done: list[dict[str, Any]] = []
    for event in events[2:-1]:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(items) == len(done), "the item before is done"
            items.append(event["item"])
        elif event["type"] == "response.output_item.done":
            done.append(event["item"])
        else:
            assert event["item_id"] == items[-1]["id"] and event["output_index"] == len(items) - 1
            if event["type"] in DELTAS:
                assert DELTAS[event["type"]] == items[-1]["type"] and event["delta"]
                texts[len(items) - 1] = texts.get(len(items) - 1, "") + event["delta"]
            elif event["type"].endswith(("text.done", "arguments.done")):
                assert event.get("text", event.get("arguments")) == texts[len(items) - 1]
    assert done == events[-1]["response"]["output"] and without_ids(done) == without_ids(whole["output"])
    assert [item["id"] for item in items] == [item["id"] for item in done]
    assert list(texts.values()) == ["Hm.", "I add.\n", '{"a": 1, "b": 2}']
    ours = ("id", "created_at", "completed_at", "output", "halfmoon")
    last = events[-1]["response"]
    assert {name: last[name] for name in last if name not in ours} == {name: whole[name] for name in whole if name not in ours}


def test_the_client_s_stream_helper_puts_a_response_together(face: Any, client: openai.OpenAI) -> None:
    face.says(ALL)
    with client.responses.stream(model="caller", input="Hello", tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.output_text.delta", "response.function_call_arguments.delta"} <= kinds
    assert found.output_text == "I add.\n" and [item.type for item in found.output] == ["reasoning", "message", "function_call"]


def test_text_comes_while_the_answer_goes_on(face: Any, client: openai.OpenAI) -> None:
    face.says("Hello there")
    face.workers.gate_at = num_tokens(face, "Hello")
    text = ""
    for event in client.responses.create(model="caller", input="Hello", stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
            face.open_gate()  # the rest waits until the client has seen the first text
    assert text == "Hello there"


def test_an_error_behind_the_first_event_is_a_failed_response(face: Any, http: httpx.Client) -> None:
    face.says("Hello there")
    face.workers.fail_at = {3: StoreFull("no page is free")}
    *before, last = events_of(http)
    assert before[0]["type"] == "response.created" and last["type"] == "response.failed"
    reply = last["response"]
    assert (reply["status"], reply["error"]["code"]) == ("failed", "store_full") and last["sequence_number"] == len(before)
    assert reply["error"]["message"].startswith("no page is free")


async def test_leaving_a_stream_ends_the_request(face: Any) -> None:
    face.says("Hello there")
    face.workers.gate_at = num_tokens(face, "Hello")
    async with openai.AsyncOpenAI(base_url=f"{face.http}/v1", api_key="none", max_retries=0) as client:
        stream = await client.responses.create(model="caller", input="Hello", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        assert await asyncio.to_thread(face.workers.cancelled.wait, 60)


# What the model is told, and what it is held to


class Sum(pydantic.BaseModel):
    a: int
    b: int


def test_parse_holds_the_answer_to_a_model(face: Any, client: openai.OpenAI) -> None:
    face.says('{"a": 1, "b": 2}')
    reply = client.responses.parse(model="caller", input="Hello", text_format=Sum)
    assert reply.output_parsed == Sum(a=1, b=2)
    assert '"additionalProperties": false' in json.dumps(json.loads(face.workers.requests[-1].sampling.grammar.text))
    with client.responses.stream(model="caller", input="Hello", text_format=Sum) as stream:
        assert stream.get_final_response().output_parsed == Sum(a=1, b=2)


def test_a_named_tool_is_the_one_that_is_called(face: Any, client: openai.OpenAI) -> None:
    face.says(SUM)
    client.responses.create(model="caller", input="Hello", tools=TOOLS, tool_choice={"type": "function", "name": "add"})
    text = face.workers.requests[-1].sampling.grammar.text
    assert '\\"add\\"' in text and "now" not in text


def test_effort_none_switches_thinking_off(face: Any, client: openai.OpenAI) -> None:
    face.says("Hello")
    client.responses.create(model="caller", input="Hello", reasoning={"effort": "none"})
    off = prompt_of(face)
    client.responses.create(model="caller", input="Hello")
    assert off != prompt_of(face) and "</think>" in off


# History


def test_the_items_of_an_answer_are_one_message_of_the_next_prompt(face: Any, client: openai.OpenAI) -> None:
    face.says(ALL, "3")
    found = client.responses.create(model="caller", input="Hello", tools=TOOLS)
    result = {"type": "function_call_output", "call_id": found.output[-1].call_id, "output": [{"type": "input_text", "text": "3"}]}  # pyright: ignore
    items: Any = [{"role": "user", "content": "Hello"}, *[item.model_dump() for item in found.output], result]
    assert client.responses.create(model="caller", input=items, tools=TOOLS).output_text == "3"
    assert prompt_of(face).endswith(
        f"<|im_start|>assistant\n<think>\nHm.\n</think>\n\nI add.\n\n{SUM}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_of_every_role_and_of_parts_are_read(face: Any, http: httpx.Client) -> None:
    face.says("x")
    parts = [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]
    said = {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed"}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": parts},
        {**said, "content": [{"type": "output_text", "text": "Hi", "annotations": []}]},
        {"role": "user", "content": "And?"},
    ]
    assert http.post(PATH, json={"input": items}).status_code == 200
    ours = prompt_of(face)
    chat = [("system", "Be kind."), ("user", "Hel\nlo"), ("assistant", "Hi"), ("user", "And?")]
    http.post("/v1/chat/completions", json={"messages": [{"role": role, "content": text} for role, text in chat]})
    assert ours == prompt_of(face)


def test_a_large_request_is_read_as_a_small_one(face: Any, http: httpx.Client) -> None:
    face.says(SUM)
    body = {"input": [{"role": "user", "content": "Hello"}], "instructions": "Add.", "tools": TOOLS, "metadata": {"x": "y" * 2**19}}
    reply = http.post(PATH, json=body).json()
    large = prompt_of(face)
    assert reply["output"][0]["type"] == "function_call" and reply["instructions"] == "Add."
    http.post(PATH, json=body | {"metadata": {}})
    assert prompt_of(face) == large


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_with_tools_comes_to_its_answer(stream: bool, face: Any, client: openai.OpenAI) -> None:
    face.says(ALL, '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 12}}\n</tool_call>', "It is 15.")
    items: list[Any] = [{"role": "user", "content": "1 + 2 + 12?"}]
    called: list[int] = []
    text = ""
    for _ in range(5):
        if stream:
            with client.responses.stream(model="caller", input=items, tools=TOOLS) as events:
                reply: Any = events.get_final_response()
        else:
            reply = client.responses.create(model="caller", input=items, tools=TOOLS)
        items += reply.output
        text = reply.output_text
        calls = [item for item in reply.output if item.type == "function_call"]
        for call in calls:
            called.append(sum(json.loads(call.arguments).values()))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": str(called[-1])})
        if not calls:
            break
    assert text == "It is 15." and called == [3, 15]


# Refusals


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "'web_search', which is not supported"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is missing"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "tools[0].name is 'a b'"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice", "'sub', which tools has not"),
        ({"tools": [ADD], "tool_choice": {"type": "web_search"}}, "tool_choice", '"name": …}'),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "'input_image'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "'item_reference', which is not supported"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'tool'"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
        ({"input": [{"type": "function_call", "name": "add"}]}, "input[0].call_id", "is missing"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "is missing"),
        ({"input": 5}, "input", "is 5"),
        ({"input": []}, "input", "empty"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens may be"),
        ({"max_tokens": 5}, "max_tokens", "did you mean max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "is missing"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format", "not enforced"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'huge'"),
        ({"model": "other"}, "model", "other"),
    ],
)
def test_what_is_wrong_is_told_by_its_name_here(fields: dict[str, Any], param: str, words: str, face: Any, http: httpx.Client) -> None:
    reply = http.post(PATH, json={"input": "Hello", **fields})
    error = reply.json()["error"]
    assert reply.status_code == (404 if param == "model" else 400) and error["param"] == param and words in error["message"], error


# Log probabilities


def spelled(tokens: Any) -> str:
    return b"".join(bytes(token.bytes) for token in tokens).decode()


@pytest.mark.parametrize("answer", ["Hello 日本語 there", ALL, f"{THOUGHT}Yes.", SUM])
def test_the_text_s_tokens_have_their_log_probabilities_and_no_others_do(answer: str, face: Any, client: openai.OpenAI) -> None:
    face.says(answer)
    asked: Any = {"model": "caller", "input": "Hello", "tools": TOOLS, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    reply = client.responses.create(**asked)
    texts = [part for item in reply.output if item.type == "message" for part in item.content if part.type == "output_text"]
    for part in texts:
        assert part.logprobs and spelled(part.logprobs) == part.text
        assert all(len(token.top_logprobs) == 2 for token in part.logprobs)
    begin = num_tokens(face, answer[: answer.index(texts[0].text)]) if texts else 0
    assert [token.logprob for part in texts for token in part.logprobs or ()] == [
        -0.5 * (begin + index + 1) for index in range(sum(len(part.logprobs or ()) for part in texts))
    ]
    assert reply.top_logprobs == 2
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    deltas = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert [token.logprob for token in deltas] == [token.logprob for part in texts for token in part.logprobs or ()]
    done = [event for event in events if event.type == "response.output_text.done"]
    assert [len(event.logprobs) for event in done] == [len(part.logprobs or ()) for part in texts]


def test_without_being_asked_for_there_are_none_and_top_logprobs_alone_asks(face: Any, client: openai.OpenAI) -> None:
    face.says("Hello")
    cases: list[tuple[Any, int | None]] = [({}, None), ({"include": ["message.output_text.logprobs"]}, 0), ({"top_logprobs": 3}, 3)]
    for options, num_tops in cases:
        (item,) = client.responses.create(model="caller", input="Hello", **options).output
        assert item.type == "message" and item.content[0].type == "output_text"
        logprobs = item.content[0].logprobs
        assert bool(logprobs) is (num_tops is not None) and {len(token.top_logprobs) for token in logprobs or ()} <= {num_tops}


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"include": ["file_search_call.results"]}, "include"), ({"top_logprobs": 21}, "top_logprobs"), ({"include": "x"}, "include")],
)
def test_other_parts_and_too_many_tops_are_refused_by_name(fields: dict[str, Any], param: str, http: httpx.Client) -> None:
    assert refused(http, **fields)["param"] == param


# Allowed tools


def test_of_allowed_tools_alone_a_call_can_be_made_and_the_model_is_told_of_all(face: Any, client: openai.OpenAI) -> None:
    face.says(SUM)
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    reply = client.responses.create(model="caller", input="Hello", tools=TOOLS, tool_choice=choice)
    assert [item.name for item in reply.output if item.type == "function_call"] == ["add"]
    assert reply.tool_choice.model_dump() == choice  # pyright: ignore[reportAttributeAccessIssue]
    held = face.workers.requests[-1].sampling.grammar.text
    assert "add" in held and '"now"' not in held and '"name": "now"' in prompt_of(face)
    free: Any = {**choice, "mode": "auto"}
    client.responses.create(model="caller", input="Hello", tools=TOOLS, tool_choice=free)
    assert face.workers.requests[-1].sampling.HasField("grammar")


@pytest.mark.parametrize("tools", [[], [{"type": "function", "name": "other"}], [{"type": "custom", "name": "add"}]])
def test_allowed_tools_that_there_are_not_are_refused(tools: list[Any], http: httpx.Client) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": tools}
    assert refused(http, tools=TOOLS, tool_choice=choice)["param"].startswith("tool_choice")
