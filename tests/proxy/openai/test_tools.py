"""Tools and reasoning over HTTP, by the unmodified openai client: a model of Qwen3's form whose answers are the test's script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ADD_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD_SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS: list[Any] = [ADD, NOW]
SUM = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
BOTH = f'{SUM}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
EOS = 1


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


def prompt_of(face: Any, position: int = -1) -> str:
    return face.tokenizer.decode(list(face.workers.requests[position].token_ids), skip_special_tokens=False)


def grammar_of(face: Any) -> Any:
    """The format of the structural tag that the last answer was held to; None: it was free."""
    sampling = face.workers.requests[-1].sampling
    if not sampling.HasField("grammar"):
        return None
    return json.loads(sampling.grammar.text)["format"]


def refused(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = http.post(CHAT, json={"messages": HELLO, **fields})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def streamed(stream: Any) -> dict[int, dict[str, Any]]:
    """The deltas of each choice put together, as OpenAI says that they are; no content may come as half of a marker."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            said = found.setdefault(choice.index, {"content": "", "calls": [], "reasoning": "", "finish_reason": None})
            said["content"] += choice.delta.content or ""
            said["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                if call.index == len(said["calls"]):
                    assert call.id and call.type == "function" and call.function.name and call.function.arguments == ""
                    said["calls"].append({"id": call.id, "name": call.function.name, "arguments": []})
                else:
                    assert call.id is None and call.function.name is None and call.function.arguments
                    said["calls"][call.index]["arguments"].append(call.function.arguments)
            said["finish_reason"] = choice.finish_reason or said["finish_reason"]
    return found


# Calls


def test_calls_are_told_from_content(face: Any, client: Any) -> None:
    face.says(f"I add.\n{BOTH}")
    (choice,) = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I add.\n"
    first, second = choice.message.tool_calls or []
    assert (first.type, first.function.name, json.loads(first.function.arguments)) == ("function", "add", {"a": 1, "b": 2})
    assert (second.function.name, second.function.arguments) == ("now", "{}")
    assert first.id.startswith("call_") and first.id != second.id


def test_content_is_null_where_there_are_calls_alone(face: Any, http: httpx.Client) -> None:
    face.says(SUM)
    (choice,) = http.post(CHAT, json={"messages": HELLO, "tools": TOOLS}).json()["choices"]
    assert choice["message"].keys() == {"role", "content", "refusal", "tool_calls"} and choice["message"]["content"] is None


def test_an_answer_without_calls_is_as_ever(face: Any, http: httpx.Client) -> None:
    face.says("Hello <tool")
    for body in ({"tools": TOOLS}, {}):
        (choice,) = http.post(CHAT, json={"messages": HELLO, **body}).json()["choices"]
        assert choice["message"] == {"role": "assistant", "content": "Hello <tool", "refusal": None}
        assert choice["finish_reason"] == "stop"


def test_streamed_calls_have_their_name_first_and_then_pieces_of_arguments(face: Any, client: Any) -> None:
    face.says(f"I add.\n{BOTH}")
    encode = face.tokenizer.encode
    # the rest of the answer waits until the client has seen a piece of the first arguments
    face.workers.gate_at = len(encode(f"I add.\n{SUM[: SUM.index('2}')]}", add_special_tokens=False))
    chunks: list[Any] = []
    asked = {"messages": HELLO, "tools": TOOLS, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(model="caller", stream=True, **asked):
        chunks.append(chunk)
        if any(call.function.arguments for choice in chunk.choices for call in choice.delta.tool_calls or []):
            face.open_gate()
    said = streamed(chunks)[0]
    assert said["content"] == "I add.\n" and said["finish_reason"] == "tool_calls"
    first, second = said["calls"]
    assert (first["name"], json.loads("".join(first["arguments"]))) == ("add", {"a": 1, "b": 2})
    assert (second["name"], "".join(second["arguments"])) == ("now", "{}")
    assert len(first["arguments"]) > 1
    assert chunks[-1].usage.completion_tokens == len(encode(f"I add.\n{BOTH}", add_special_tokens=False)) + 1


def test_each_choice_is_read_by_itself(face: Any, client: Any) -> None:
    answers = {7: SUM, 8: "No.", 9: BOTH}
    encode = face.tokenizer.encode
    face.workers.script = lambda sequence: [*encode(answers[sequence.sampling.seed], add_special_tokens=False), EOS]
    stream = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, n=3, seed=7, stream=True)
    said = streamed(stream)
    assert [(len(said[index]["calls"]), said[index]["content"], said[index]["finish_reason"]) for index in range(3)] == [
        (1, "", "tool_calls"),
        (0, "No.", "stop"),
        (2, "", "tool_calls"),
    ]
    whole = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, n=3, seed=7).choices
    assert [len(choice.message.tool_calls or ()) for choice in whole] == [1, 0, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_of_all_tokens_those_of_markers_too(stream: bool, face: Any, client: Any) -> None:
    face.says(SUM)
    reply: Any = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, logprobs=True, stream=stream)
    found = [choice.logprobs for chunk in (reply if stream else [reply]) for choice in chunk.choices]
    tokens = [token for logprobs in found if logprobs is not None for token in logprobs.content]
    assert b"".join(bytes(token.bytes) for token in tokens) == SUM.encode() + b"</s>"
    assert [token.logprob for token in tokens] == [-0.5 * (index + 1) for index in range(len(tokens))]


def test_token_ids_and_running_usage_come_where_text_is_held_back(face: Any, http: httpx.Client) -> None:
    face.says(SUM)
    body = {"messages": HELLO, "tools": TOOLS, "stream": True, "return_token_ids": True}
    with http.stream("POST", CHAT, json=body | {"stream_options": {"continuous_usage_stats": True}}) as reply:
        chunks = [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line and "[DONE]" not in line]
    expected = [*face.tokenizer.encode(SUM, add_special_tokens=False), EOS]
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])] == expected
    assert chunks[-1]["usage"]["completion_tokens"] == len(expected)


def test_an_answer_that_is_cut_off_in_a_call_has_the_reason_length(face: Any, client: Any) -> None:
    face.says(SUM)
    num_tokens = len(face.tokenizer.encode(SUM[: SUM.index("2}")], add_special_tokens=False))
    (choice,) = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, max_tokens=num_tokens).choices
    assert choice.finish_reason == "length" and (choice.message.tool_calls or [])[0].function.arguments.startswith('{"a": 1')


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_first_one_is_given_on(stream: bool, face: Any, client: Any) -> None:
    face.says(f"{BOTH}\nDone.")
    reply: Any = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, parallel_tool_calls=False, stream=stream)
    calls = streamed(reply)[0]["calls"] if stream else reply.choices[0].message.tool_calls
    assert len(calls) == 1


def test_a_malformed_call_is_content(face: Any, client: Any) -> None:
    face.says("<tool_call>add(1, 2)</tool_call>")
    (choice,) = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS).choices
    assert (choice.message.content, choice.message.tool_calls) == ("<tool_call>add(1, 2)</tool_call>", None)
    said = streamed(client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, stream=True))[0]
    assert said["content"] == "<tool_call>add(1, 2)</tool_call>" and said["finish_reason"] == "stop"


# What the model is told, and what it is held to


def test_the_model_is_told_of_the_tools_unless_it_may_not_call(face: Any, client: Any) -> None:
    face.says(SUM)
    client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS)
    assert '"name": "add"' in prompt_of(face) and grammar_of(face) is None
    (choice,) = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, tool_choice="none").choices
    assert '"name": "add"' not in prompt_of(face)
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (SUM, None, "stop")


@pytest.mark.parametrize(("parallel", "repeats"), [(True, True), (False, False), (None, True)])
def test_required_calls_are_held_to_the_functions_in_the_model_s_own_form(
    parallel: bool | None, repeats: bool, face: Any, http: httpx.Client
) -> None:
    face.says(SUM)
    body = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel, "chat_template_kwargs": {"enable_thinking": False}}
    assert http.post(CHAT, json={"messages": HELLO, **body}).json()["choices"][0]["finish_reason"] == "tool_calls"
    text = json.dumps(grammar_of(face))
    assert face.workers.requests[-1].sampling.grammar.kind == "tools"
    assert '{\\"name\\": \\"add\\", \\"arguments\\": ' in text and '{\\"name\\": \\"now\\", \\"arguments\\": ' in text
    assert ('"plus"' in text) is repeats


def test_a_named_call_is_one_of_that_function(face: Any, client: Any) -> None:
    face.says(SUM)
    choice: Any = {"type": "function", "function": {"name": "add"}}
    reply = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, tool_choice=choice)
    text = json.dumps(grammar_of(face))
    assert json.dumps(ADD_SCHEMA) in text and '"now' not in text and '"plus"' not in text
    assert reply.choices[0].finish_reason == "tool_calls"


def test_calls_of_strict_functions_are_held_to_their_schema_where_the_model_is_free_to_call(face: Any, client: Any) -> None:
    face.says(SUM)

    class Add(pydantic.BaseModel):
        a: int
        b: int

    tools: Any = [openai.pydantic_function_tool(Add), NOW]
    client.chat.completions.create(model="caller", messages=HELLO, tools=tools)
    found = grammar_of(face)["elements"][1]
    assert found["type"] == "dispatch" and found["rules"][0][0] == "<tool_call>" and found["loop"]
    assert '"additionalProperties": false' in json.dumps(found)


def test_an_answer_may_be_a_call_or_what_response_format_says(face: Any, client: Any) -> None:
    face.says(SUM)
    client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, response_format={"type": "json_object"})
    calls, answer = grammar_of(face)["elements"][1]["elements"]
    assert "<tool_call>" in json.dumps(calls) and answer["json_schema"] == {"type": "object"}


def test_a_grammar_lets_a_model_reason_first(face: Any, http: httpx.Client) -> None:
    face.says('<think>\nHm.\n</think>\n\n{"a": 1}')
    body = {"messages": HELLO, "response_format": {"type": "json_object"}}
    message = http.post(CHAT, json=body).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ('{"a": 1}', "Hm.")
    assert grammar_of(face)["elements"][0]["type"] == "optional"
    http.post(CHAT, json=body | {"chat_template_kwargs": {"enable_thinking": False}})
    assert face.workers.requests[-1].sampling.grammar.kind == "json_object"


# Reasoning


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_from_the_answer_and_from_calls(stream: bool, face: Any, client: Any) -> None:
    face.says(f"<think>\nA <tool_call>?\n</think>\n\nI add.\n{SUM}")
    reply: Any = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, stream=stream)
    if stream:
        said = streamed(reply)[0]
        assert (said["reasoning"], said["content"], len(said["calls"])) == ("A <tool_call>?", "I add.\n", 1)
    else:
        message = reply.choices[0].message
        assert message.reasoning_content == message.reasoning == "A <tool_call>?"
        assert (message.content, len(message.tool_calls)) == ("I add.\n", 1)


def test_an_answer_that_the_prompt_keeps_from_reasoning_is_content(face: Any, http: httpx.Client) -> None:
    face.says("<think> is a tag")
    body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    message = http.post(CHAT, json=body).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think> is a tag", "refusal": None}


# History


def test_calls_results_and_reasoning_of_before_are_in_the_prompt(face: Any, client: Any) -> None:
    face.says(f"<think>\nHm.\n</think>\n\n{SUM}", "3")
    reply = client.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS)
    message = reply.choices[0].message
    result = {"role": "tool", "tool_call_id": (message.tool_calls or [])[0].id, "content": [{"type": "text", "text": "3"}]}
    client.chat.completions.create(model="caller", messages=[*HELLO, message.model_dump(), result], tools=TOOLS)
    assert prompt_of(face).endswith(
        f"<|im_start|>assistant\n<think>\nHm.\n</think>\n\n\n{SUM}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("arguments", "shown"), [('{"a": 1}', '{"a": 1}'), ({"a": 1}, '{"a": 1}'), ("", "{}"), (None, "{}"), ('{"a": ', "{}"), ("[1]", "{}")]
)
def test_arguments_of_before_are_an_object_for_the_template(arguments: Any, shown: str, face: Any, http: httpx.Client) -> None:
    face.says("x")
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}
    assert http.post(CHAT, json={"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]}).status_code == 200
    assert f'{{"name": "add", "arguments": {shown}}}' in prompt_of(face)


def test_a_large_request_has_its_tools_and_history_too(face: Any, http: httpx.Client) -> None:
    face.says(SUM)
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "2"}]
    body = {"messages": messages, "tools": TOOLS, "metadata": {"x": "y" * 2**19}}
    reply = http.post(CHAT, json=body).json()
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    http.post(CHAT, json=body | {"metadata": {}})
    assert prompt_of(face) == prompt_of(face, -2) and '"arguments": {"a": 1}}' in prompt_of(face)


# Refusals


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "must be of type 'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "of type 'function', and have one"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters, digits"),
        ({"tools": [ADD, NOW, ADD]}, "tools", "'add' more than once"),
        ({"tools": [ADD] * 1025}, "tools", "1025 items"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "none, auto, required, "),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "'sub', which tools has not"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"functions": [{"name": "add"}]}, "functions", "not supported"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content", "has no content"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id", "of role 'tool', not 'user'"),
        ({"messages": [{"role": "tool", "content": "x", "reasoning": "y"}]}, "messages[0].reasoning", "of role 'assistant'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}, "messages[0].tool_calls", "is missing"),
    ],
)
def test_what_is_wrong_with_tools_is_told(fields: dict[str, Any], param: str, words: str, face: Any, http: httpx.Client) -> None:
    error = refused(http, **fields)
    assert error["param"] is not None and error["param"].startswith(param) and words in error["message"]


def schema_of(parameters: Any, **more: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "add", "parameters": parameters, **more}}]


def test_a_strict_function_whose_schema_can_t_be_enforced_is_refused_and_another_is_not(face: Any, http: httpx.Client) -> None:
    loose = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    error = refused(http, tools=schema_of(loose, strict=True))
    assert error["param"] == "tools[0].function.parameters" and "'not', which is not enforced" in error["message"]
    face.says(SUM)
    assert http.post(CHAT, json={"messages": HELLO, "tools": schema_of(loose)}).status_code == 200
    nested: Any = {"type": "object"}
    for _ in range(200):
        nested = {"type": "object", "properties": {"a": nested}}
    assert "nested more than 128 deep" in refused(http, tools=schema_of(nested))["message"]
    assert "must be object" in refused(http, tools=schema_of({"type": "string"}))["message"]


def test_a_server_without_a_parser_takes_tools_only_where_they_are_not_to_be_called(shared_face: Any) -> None:
    with httpx.Client(base_url=shared_face.http, timeout=60) as http:
        error = refused(http, tools=TOOLS)
        assert error["param"] == "tools" and "no tool parser" in error["message"] and "hermes, llama3_json" in error["message"]
        assert http.post(CHAT, json={"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}).status_code == 200


def test_completions_have_no_tools(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"prompt": "x", "tools": TOOLS})
    assert reply.status_code == 400 and reply.json()["error"]["message"] == "tools is not supported; leave it out"


# An agent


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_with_two_tools_comes_to_its_answer(stream: bool, face: Any, client: Any) -> None:
    face.says(
        f"<think>\nBoth at once.\n</think>\n\n{BOTH}",
        '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 12}}\n</tool_call>',
        "At noon it is 15.",
    )
    functions: dict[str, Callable[..., str]] = {"add": lambda a, b: str(a + b), "now": lambda: "12"}
    messages: list[Any] = [{"role": "user", "content": "1 + 2 + the hour?"}]
    called: list[str] = []
    content: Any = None
    for _ in range(5):
        reply: Any = client.chat.completions.create(model="caller", messages=messages, tools=TOOLS, stream=stream)
        if stream:
            said = streamed(reply)[0]
            calls = [(call["id"], call["name"], "".join(call["arguments"])) for call in said["calls"]]
            content, reason = said["content"], said["finish_reason"]
        else:
            message, reason = reply.choices[0].message, reply.choices[0].finish_reason
            calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
            content = message.content
        if reason != "tool_calls":
            break
        asked = [{"id": key, "type": "function", "function": {"name": name, "arguments": found}} for key, name, found in calls]
        messages.append({"role": "assistant", "content": content, "tool_calls": asked})
        for key, name, found in calls:
            called.append(functions[name](**json.loads(found)))
            messages.append({"role": "tool", "tool_call_id": key, "content": called[-1]})
    assert content == "At noon it is 15." and called == ["3", "12", "15"]
    assert "<tool_response>\n15\n</tool_response>" in prompt_of(face)


def test_a_chat_s_tokens_are_counted_with_the_tools_that_the_model_is_told_of(face: Any, http: httpx.Client) -> None:
    face.says("Hello")
    with_tools = {"messages": HELLO, "tools": TOOLS}
    counted = http.post("/tokenize", json=with_tools).json()["count"]
    assert counted == http.post(CHAT, json=with_tools).json()["usage"]["prompt_tokens"]
    assert counted > http.post("/tokenize", json={"messages": HELLO}).json()["count"]


def test_of_allowed_tools_alone_a_call_can_be_made_and_the_model_is_told_of_all(face: Any, client: Any) -> None:
    face.says(SUM)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    asked: Any = {"model": "caller", "messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    (choice,) = client.chat.completions.create(**asked).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]
    held = json.dumps(grammar_of(face))
    assert "add" in held and '"now"' not in held and '"name": "now"' in prompt_of(face)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "sql", "format": {"type": "text"}}}]}, "of type 'custom'"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "sql"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "allows no tool"),
    ],
)
def test_custom_tools_and_empty_choices_are_refused_by_name(fields: dict[str, Any], says: str, http: httpx.Client) -> None:
    error = refused(http, **fields)
    assert says in error["message"] and error["param"].startswith(("tools", "tool_choice"))
