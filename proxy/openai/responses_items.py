"""The items of a Responses request as the messages of a chat.

instructions ─► a system message       reasoning, message of role assistant, function_call … ─► one assistant's message
message ─► a message of its role       function_call_output ─► a message of role tool
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from ...protocol.errors import InvalidRequest, shown
from ..text.chat_template import ChatMessage
from .tool_bodies import CalledFunction, ToolCallBody
from .types import Checked

TEXTS = ("input_text", "output_text")
REASONING_TEXTS = ("reasoning_text", "summary_text")


def _kind(value: Any) -> str:
    return "string" if isinstance(value, str) else "items"


class TextPart(BaseModel):
    """Replies' parts come back with more fields, such as annotations."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None

    def to_text(self, path: str, types: Sequence[str]) -> str:
        if self.type not in types:
            raise InvalidRequest(f"{path} is of type {shown(self.type)}; it must be of type {' or '.join(types)}", param=path)
        if self.text is None:
            raise InvalidRequest(f"{path} has no text; give it a string", param=path)
        return self.text


Text = Annotated[Annotated[str, Tag("string")] | Annotated[Checked[TextPart], Tag("items")], Discriminator(_kind)]


class InputItem(BaseModel):
    """A message, a function's call or its output, or reasoning. Items of replies come back with more fields, such as id and status."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str | None = None
    """None: a message."""
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Text | None = None
    summary: Checked[TextPart] | None = None


Input = Annotated[Annotated[str, Tag("string")] | Annotated[Checked[InputItem], Tag("items")], Discriminator(_kind)]


def to_messages(instructions: str | None, given: str | Sequence[InputItem]) -> list[ChatMessage]:
    """Raises InvalidRequest."""
    chat = _Chat()
    if instructions is not None:
        chat.messages.append(ChatMessage("system", instructions))
    if isinstance(given, str):
        return [*chat.messages, ChatMessage("user", given)]
    for position, item in enumerate(given):
        chat.add(item, f"input[{position}]")
    chat.end_turn()
    return chat.messages


class _Chat:
    """What an assistant gave in one turn is one message, as in a chat, so that a template writes it as the model did."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, item: InputItem, path: str) -> None:
        kind = item.type or "message"
        if kind == "message":
            self._message(item, path)
        elif kind == "reasoning":
            if self._content or self._calls:
                self.end_turn()
            self._reasoning.append(_reasoning(item, path))
        elif kind == "function_call":
            name, call_id = _required(item, "name", path), _required(item, "call_id", path)
            self._calls.append(ToolCallBody(id=call_id, function=CalledFunction(name=name, arguments=item.arguments)).to_call())
        elif kind == "function_call_output":
            self.end_turn()
            text = _text(item.output, f"{path}.output")
            self.messages.append(ChatMessage("tool", text, {"tool_call_id": _required(item, "call_id", path)}))
        else:
            raise InvalidRequest(f"{path} is of type {shown(kind)}, which is not supported; leave it out", param=path)

    def end_turn(self) -> None:
        if self._content or self._reasoning or self._calls:
            reasoning = "".join(self._reasoning)
            found = {"tool_calls": self._calls, "reasoning": reasoning, "reasoning_content": reasoning}
            extra = {name: value for name, value in found.items() if value}
            self.messages.append(ChatMessage("assistant", "".join(self._content), extra))
        self._content, self._reasoning, self._calls = [], [], []

    def _message(self, item: InputItem, path: str) -> None:
        role, text = _required(item, "role", path), _text(item.content, f"{path}.content")
        if role == "assistant":
            if self._content and not self._calls:
                self.end_turn()
            self._content.append(text)
            return
        self.end_turn()
        self.messages.append(ChatMessage("system" if role == "developer" else role, text))


def _reasoning(item: InputItem, path: str) -> str:
    """The summary where the reasoning itself is not there."""
    if item.content:
        return _text(item.content, f"{path}.content", REASONING_TEXTS)
    return "\n".join(part.to_text(f"{path}.summary[{index}]", REASONING_TEXTS) for index, part in enumerate(item.summary or ()))


def _text(value: str | Sequence[TextPart] | None, path: str, types: Sequence[str] = TEXTS) -> str:
    if value is None:
        raise InvalidRequest(f"{path} is missing; give it a string", param=path)
    if isinstance(value, str):
        return value
    return "\n".join(part.to_text(f"{path}[{index}]", types) for index, part in enumerate(value))


def _required(item: InputItem, name: str, path: str) -> str:
    value: str | None = getattr(item, name)
    if value is None:
        raise InvalidRequest(f"{path}.{name} is missing", param=f"{path}.{name}")
    return value
