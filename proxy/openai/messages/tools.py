"""tools and tool_choice of a message request, as those of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ....protocol.errors import InvalidRequest, shown
from ...text.tools import ToolUse
from ..tool_bodies import FunctionBody, NamedFunction, NamedToolChoice, ToolBody, tool_use
from ..tool_bodies import ToolChoice as ChatToolChoice

_OURS = {".function.parameters": ".input_schema", ".function.name": ".name"}
"""Of paths in errors: a chat's, and what they are here."""


class Tool(BaseModel):
    """More fields, such as cache_control, are taken and change nothing."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    """JSON schema of an object."""
    strict: bool | None = None

    def to_chat(self, path: str) -> ToolBody:
        if self.type not in (None, "custom"):
            raise InvalidRequest(
                f"{path} is of type {shown(self.type)}; this server runs no tools of its own, so send tools of type 'custom'", param=path
            )
        if self.input_schema is None:
            raise InvalidRequest(f"{path}.input_schema is missing", param=f"{path}.input_schema")
        # templates see what was set, and no more
        optional = {name: value for name in ("description", "strict") if (value := getattr(self, name)) is not None}
        function = FunctionBody(name=self.name, **optional, parameters=self.input_schema)
        return ToolBody(function=function)


class ToolChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """Of the tool, with type tool."""
    disable_parallel_tool_use: bool | None = None

    def to_chat(self) -> ChatToolChoice:
        if self.type == "tool":
            if self.name is None:
                raise InvalidRequest("tool_choice.name is missing; type tool needs one", param="tool_choice.name")
            return NamedToolChoice(type="function", function=NamedFunction(name=self.name))
        return "required" if self.type == "any" else self.type


def message_tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> ToolUse:
    """Raises InvalidRequest."""
    found = [tool.to_chat(f"tools[{position}]") for position, tool in enumerate(tools or ())]
    parallel = None if choice is None else not choice.disable_parallel_tool_use
    try:
        return tool_use(found, None if choice is None else choice.to_chat(), parallel)
    except InvalidRequest as error:
        message, param = error.message, str(error.fields.get("param"))
        for chats, ours in _OURS.items():
            message, param = message.replace(chats, ours), param.replace(chats, ours)
        raise InvalidRequest(message, param=param) from error
