"""What a chat is made of: messages, tools and the calls of them, in OpenAI's shapes, to the messages of gRPC and back.

{"role": "user", "content": …} ─► ChatMessage       {"type": "function", "function": …} ─► Tool       ToolCallDelta … ─► ToolCall
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from ..protocol.errors import InvalidRequest, shown
from ..protocol.v1 import inference_pb2


class Message(NamedTuple):
    """One turn of a chat. A mapping with the same keys does as well, and may have more.

    Those of an assistant's turn are `tool_calls` and `reasoning`, that of a tool's is `tool_call_id`; `name` goes with any.
    """

    role: str
    content: str | Sequence[Mapping[str, Any]]
    """A text, or parts {"type": "text", "text": …}, which become its lines."""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A call begins with its id and name; its arguments follow in pieces."""

    number: int
    """Of the call in its answer, from 0."""
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON of an object, unless the answer was cut off in it."""


def tool_calls_of(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """Those of one choice, put together."""
    begun: dict[int, ToolCallDelta] = {}
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        begun.setdefault(delta.number, delta)
        arguments.setdefault(delta.number, []).append(delta.arguments)
    return tuple(ToolCall(first.id, first.name, "".join(arguments[number])) for number, first in begun.items())


def message_to_proto(turn: Message | Mapping[str, Any]) -> inference_pb2.ChatMessage:
    """Raises InvalidRequest for a part of another type than text, and for a key that a message has not."""
    given: dict[str, Any] = {**turn} if isinstance(turn, Mapping) else turn._asdict()
    reasoning = given.pop("reasoning_content", None)
    content = given.pop("content", None) if given["role"] == "assistant" else given.pop("content")  # of calls alone there is none
    message = inference_pb2.ChatMessage(role=given.pop("role"), content=_text(content))
    message.tool_calls.extend(_call(call) for call in given.pop("tool_calls", None) or ())
    message.reasoning = given.pop("reasoning", None) or reasoning or ""
    for name in ("name", "tool_call_id"):
        setattr(message, name, given.pop(name, None) or "")
    for name, value in given.items():
        if value not in (None, [], {}):
            raise InvalidRequest(f"a message has {shown(name)}, which is not supported; leave it out", param="messages")
    return message


def tool_to_proto(tool: Mapping[str, Any]) -> inference_pb2.Tool:
    """Raises InvalidRequest for what is no function."""
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise InvalidRequest(f"a tool is {shown(tool)}; it must be of type 'function', and have one", param="tools")
    given = cast(Mapping[str, Any], function)
    parameters = given.get("parameters")
    return inference_pb2.Tool(
        name=given["name"],
        description=given.get("description") or "",
        parameters="" if parameters is None else json.dumps(parameters),
        strict=bool(given.get("strict")),
    )


def choice_to_proto(choice: str | Mapping[str, Any]) -> inference_pb2.ToolChoice:
    """Raises InvalidRequest for a choice of another shape."""
    if isinstance(choice, str):
        return inference_pb2.ToolChoice(mode=choice)
    function: Any = choice.get("function")
    if choice.get("type") != "function" or not isinstance(function, Mapping):
        raise InvalidRequest(
            f'tool_choice is {shown(choice)}; it must be auto, none, required or {{"type": "function", "function": {{"name": …}}}}',
            param="tool_choice",
        )
    return inference_pb2.ToolChoice(function=cast(Mapping[str, Any], function)["name"])


def _text(content: Any) -> str:
    """Parts are lines, as in the proxy's HTTP."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = cast(Sequence[Mapping[str, Any]], content)
    for position, part in enumerate(parts):
        if part.get("type") != "text":
            raise InvalidRequest(
                f"content[{position}] is of type {shown(part.get('type'))}; this model takes parts of type 'text' alone", param="messages"
            )
    return "\n".join(part["text"] for part in parts)


def _call(call: ToolCall | Mapping[str, Any]) -> inference_pb2.ToolCall:
    if isinstance(call, ToolCall):
        return inference_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
    function = call["function"]
    arguments = function.get("arguments") or ""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return inference_pb2.ToolCall(id=call.get("id") or "", name=function["name"], arguments=text)
