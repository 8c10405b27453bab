"""Tools, reasoning and content parts by the SDK: a model of Qwen3's form whose answers are the test's script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from halfmoon.client import AsyncClient, Client, Delta, InvalidRequest, Message, ToolCall
from halfmoon.proxy.text.tokenizer import Tokenizer

HELLO = [Message("user", "Hello")]
ADD_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD_SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
SUM = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
BOTH = f'{SUM}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"


@pytest.fixture(scope="module")
def caller(make_face: Callable[..., Any], faces: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = faces.write_model_folder(tmp_path_factory.mktemp("models") / "caller", faces.TOOLS_CHATML, max_model_len=4096)
    return make_face(folder, Tokenizer.from_folder(folder))


@pytest.fixture
def face(caller: Any) -> Any:
    caller.reset()
    return caller


def blocking(face: Any, **ask: Any) -> tuple[list[Any], Any]:
    """The events and the completion."""
    with Client(face.grpc) as client, client.stream(**ask) as stream:
        return list(stream), stream.completion()


def awaiting(face: Any, **ask: Any) -> tuple[list[Any], Any]:
    async def run() -> tuple[list[Any], Any]:
        async with AsyncClient(face.grpc) as client, client.stream(**ask) as stream:
            return [event async for event in stream], await stream.completion()

    return asyncio.run(run())


def prompt_of(face: Any) -> str:
    return face.tokenizer.decode(list(face.workers.requests[-1].token_ids), skip_special_tokens=False)


def tag_of(face: Any) -> Any:
    """What the last answer was held to; None: nothing."""
    sampling = face.workers.requests[-1].sampling
    return json.loads(sampling.grammar.text)["format"] if sampling.HasField("grammar") else None


@pytest.mark.parametrize("run", [blocking, awaiting])
def test_calls_and_reasoning_are_told_from_text_as_they_come(face: Any, run: Any) -> None:
    face.says(f"{THOUGHT}I add.\n{BOTH}")
    events, completion = run(face, messages=HELLO, tools=[ADD, NOW])
    assert (completion.reasoning, completion.text, completion.finish_reason) == ("Hm.", "I add.\n", "stop")
    add, now = completion.tool_calls
    assert (add.name, json.loads(add.arguments), now.name, now.arguments) == ("add", {"a": 1, "b": 2}, "now", "{}")
    assert add.id != now.id and add.id and now.id
    deltas = [event for event in events if isinstance(event, Delta)]
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert [(call.number, call.name) for call in calls if call.id] == [(0, "add"), (1, "now")]
    assert "".join(call.arguments for call in calls if call.number == 0) == add.arguments
    assert not any("<" in delta.text + delta.reasoning for delta in deltas)
    assert len(completion.token_ids) == completion.usage.num_completion_tokens
    assert '{"type": "function", "function": {"name": "add", "description": "Adds."' in prompt_of(face)


def test_a_call_and_its_result_go_back_into_the_chat(face: Any) -> None:
    face.says(f"{THOUGHT}{SUM}", "Three.")
    with Client(face.grpc) as client:
        messages: list[Any] = [*HELLO]
        first = client.generate(messages=messages, tools=[ADD])
        messages += [first.message, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "3"}]
        assert client.generate(messages=messages, tools=[ADD]).text == "Three."
        told = prompt_of(face)
        assert "<think>\nHm.\n</think>" in told and SUM in told and "<tool_response>\n3\n</tool_response>" in told
        openai_s = {
            "role": "assistant",
            "tool_calls": [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
        }
        client.generate(messages=[*HELLO, openai_s, {"role": "tool", "tool_call_id": "x", "content": "3"}], tools=[ADD])
        assert SUM in prompt_of(face)


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, True),
        ({"tools": [{"type": "function", "function": {**ADD["function"], "strict": True}}]}, True),
    ],
)
def test_required_named_and_strict_calls_are_held_by_a_grammar(face: Any, options: dict[str, Any], held: bool) -> None:
    face.says(SUM)
    _, completion = blocking(face, **{"messages": HELLO, "tools": [ADD], **options})
    assert (tag_of(face) is not None) is held
    assert completion.tool_calls == (ToolCall(completion.tool_calls[0].id, "add", '{"a": 1, "b": 2}'),)


def test_without_parallel_calls_there_is_one_and_with_none_all_is_text(face: Any) -> None:
    face.says(BOTH)
    assert [call.name for call in blocking(face, messages=HELLO, tools=[ADD, NOW], parallel_tool_calls=False)[1].tool_calls] == ["add"]
    _, completion = blocking(face, messages=HELLO, tools=[ADD, NOW], tool_choice="none")
    assert completion.text == BOTH and completion.tool_calls == () and "# Tools" not in prompt_of(face)


def test_reasoning_is_told_from_text_where_that_is_asked_for_and_stays_in_it_else(face: Any) -> None:
    face.says(f"{THOUGHT}Yes.")
    assert blocking(face, messages=HELLO)[1].text == f"{THOUGHT}Yes."
    _, completion = blocking(face, messages=HELLO, parse_reasoning=True)
    assert (completion.reasoning, completion.text) == ("Hm.", "Yes.")


def test_each_choice_is_read_by_itself(face: Any) -> None:
    answers = {7: SUM, 8: "No.", 9: f"{THOUGHT}{BOTH}"}
    face.workers.script = lambda sequence: [*face.tokenizer.encode(answers[sequence.sampling.seed], add_special_tokens=False), 1]
    _, completion = blocking(face, messages=HELLO, tools=[ADD, NOW], n=3, seed=7)
    assert [(len(choice.tool_calls), choice.text, choice.reasoning) for choice in completion.choices] == [
        (1, "", ""),
        (0, "No.", ""),
        (2, "", "Hm."),
    ]


def test_text_parts_are_lines_and_others_are_refused_by_their_type(face: Any) -> None:
    part = {"type": "text", "text": "One", "cache_control": {"type": "ephemeral"}}
    blocking(face, messages=[{"role": "user", "content": [part, {"type": "text", "text": "Two"}]}])
    assert "<|im_start|>user\nOne\nTwo<|im_end|>" in prompt_of(face)
    with pytest.raises(InvalidRequest, match=r"content\[1\] is of type 'image_url'"):
        blocking(face, messages=[{"role": "user", "content": [part, {"type": "image_url", "image_url": {"url": "x"}}]}])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": "x", "tools": [ADD]}, "tools belongs to a chat"),
        ({"prompt": "x", "parse_reasoning": True}, "parse_reasoning belongs to a chat"),
        ({"messages": HELLO, "tools": [{"type": "web_search"}]}, "must be of type 'function'"),
        ({"messages": HELLO, "tools": [{"function": {"name": "a b"}}]}, r"tools\[0\].name is 'a b'"),
        ({"messages": HELLO, "tools": [ADD, ADD]}, "'add' more than once"),
        ({"messages": HELLO, "tools": [ADD], "tool_choice": "any"}, "tool_choice is 'any'"),
        ({"messages": HELLO, "tools": [ADD], "tool_choice": {"name": "add"}}, "must be auto, none, required"),
        (
            {"messages": HELLO, "tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "names 'x', which tools has not",
        ),
        ({"messages": HELLO, "tool_choice": "required"}, "there are no tools"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": 1}}]}, "a message has 'audio'"),
        (
            {"messages": HELLO, "tools": [{"function": {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}}]},
            r"tools\[0\].parameters: schema has 'not'",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(face: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        blocking(face, **options)


def test_a_large_chat_with_tools_is_parsed_alike(face: Any) -> None:
    face.says(SUM)
    long = {"type": "function", "function": {**ADD["function"], "description": "x" * 300_000}}
    with pytest.raises(InvalidRequest, match="maximum context length"):
        blocking(face, messages=HELLO, tools=[long])
    many = [{"role": "user", "content": "Hello"}] * 2
    _, completion = blocking(face, messages=many, tools=[ADD], cache_salt="x")
    assert completion.tool_calls[0].name == "add"
