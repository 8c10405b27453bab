"""Messages of content blocks, as Anthropic has them, as messages for a chat template.

user: text, tool_result             ─► a message of role tool for each result, and of role user for the text around them
assistant: text, thinking, tool_use ─► one message with content, reasoning_content and tool_calls
Neighbours of one role are one turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from ....protocol.errors import InvalidRequest, shown
from ...text.chat_template import ChatMessage
from ..types import Checked, ContentPart

Placed = list[tuple[str, "Block"]]
"""Blocks with their paths in the body, for errors."""
Value = TypeVar("Value")
_TYPES = {"user": "text or tool_result", "assistant": "text, thinking or tool_use", "system": "text"}


class Block(BaseModel):
    """What belongs to no type that is served, such as cache_control and citations, is taken and changes nothing."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Checked[ContentPart] | None = None
    is_error: bool | None = None


class MessageBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["user", "assistant", "system"]
    content: str | Checked[Block]

    def blocks(self, path: str) -> Placed:
        if isinstance(self.content, str):
            return [(path, Block(type="text", text=self.content))]
        return [(f"{path}[{index}]", block) for index, block in enumerate(self.content)]


def chat_of(messages: Sequence[MessageBody], system: str | Sequence[ContentPart] | None) -> list[ChatMessage]:
    """Raises InvalidRequest."""
    if not messages:
        raise InvalidRequest("messages is empty; send at least one", param="messages")
    found = [ChatMessage("system", text)] if (text := joined(system, "system")) else []
    names: dict[str, str] = {}  # of the functions called so far, by the calls' ids
    for role, turns in itertools.groupby(enumerate(messages), key=lambda item: item[1].role):
        blocks = [placed for position, turn in turns for placed in turn.blocks(f"messages[{position}].content")]
        found += [_answer(blocks, names)] if role == "assistant" else _turn(role, blocks, names)
    last = messages[-1]
    if last.role == "assistant" and found[-1].extra.get("tool_calls"):
        path = f"messages[{len(messages) - 1}].content"
        raise InvalidRequest(f"{path} calls tools, and nothing follows; send a tool_result for each tool_use", param=path)
    return found


def joined(content: str | Sequence[ContentPart] | None, path: str) -> str:
    """A text, or the lines of several."""
    if isinstance(content, str):
        return content
    return "\n".join(part.to_text(f"{path}[{index}]") for index, part in enumerate(content or ()))


def _turn(role: str, blocks: Placed, names: dict[str, str]) -> Iterator[ChatMessage]:
    """Of a user or a system."""
    texts = list[str]() if blocks else [""]
    for path, block in blocks:
        if block.type == "tool_result" and role == "user":
            if texts:
                yield ChatMessage(role, "\n".join(texts))
                texts = []
            yield _result(block, path, names)
        else:
            texts.append(_text(block, path, role))
    if texts:
        yield ChatMessage(role, "\n".join(texts))


def _result(block: Block, path: str, names: dict[str, str]) -> ChatMessage:
    call_id = _given(block.tool_use_id, f"{path}.tool_use_id")
    if call_id not in names:
        raise InvalidRequest(
            f"{path}.tool_use_id is {shown(call_id)}, and no tool_use before it has that id; send the assistant's message with it",
            param=f"{path}.tool_use_id",
        )
    text = joined(block.content, f"{path}.content")
    # templates know of no errors: the text says it
    return ChatMessage("tool", f"Error: {text}" if block.is_error else text, {"tool_call_id": call_id, "name": names[call_id]})


def _answer(blocks: Placed, names: dict[str, str]) -> ChatMessage:
    texts, reasoning, calls = list[str](), list[str](), list[dict[str, Any]]()
    for path, block in blocks:
        if block.type == "thinking":
            reasoning.append(_given(block.thinking, f"{path}.thinking"))
        elif block.type == "tool_use":
            call_id, name = _given(block.id, f"{path}.id"), _given(block.name, f"{path}.name")
            names[call_id] = name
            arguments = _given(block.input, f"{path}.input")
            calls.append({"type": "function", "function": {"name": name, "arguments": arguments}, "id": call_id})
        elif block.type != "redacted_thinking":  # nobody here can read that
            texts.append(_text(block, path, "assistant"))
    thought = "\n".join(reasoning)
    extra = {"tool_calls": calls, "reasoning": thought, "reasoning_content": thought}
    return ChatMessage("assistant", "".join(texts), {name: value for name, value in extra.items() if value})


def _text(block: Block, path: str, role: str) -> str:
    if block.type != "text":
        raise InvalidRequest(f"{path} is of type {shown(block.type)}; a message of role {role!r} may have {_TYPES[role]}", param=path)
    return _given(block.text, f"{path}.text")


def _given(value: Value | None, path: str) -> Value:
    if value is None:
        raise InvalidRequest(f"{path} is missing", param=path)
    return value
