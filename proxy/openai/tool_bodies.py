"""tools, tool_choice and parallel_tool_calls of a chat, and the calls in its history, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ...protocol.errors import InvalidRequest, shown
from ..text.tools import Function, ToolUse, call_of


class FunctionBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of an object; none: there are no parameters."""
    strict: bool | None = None


class ToolBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: str = "function"
    function: FunctionBody | None = None

    def to_function(self, position: int) -> Function:
        path = f"tools[{position}]"
        if self.type != "function" or self.function is None:
            raise InvalidRequest(f"{path} is of type {shown(self.type)}; it must be of type 'function', and have one", param=path)
        function = self.function
        return Function.checked(function.name, function.parameters, bool(function.strict), f"{path}.function")


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class NamedToolChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: NamedFunction


class AllowedTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    mode: Literal["auto", "required"]
    tools: list[AllowedTool]


class AllowedToolChoice(BaseModel):
    """Some of the tools: the model is told of all."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCallBody(BaseModel):
    """A call of an assistant's message, as replies have it."""

    model_config = ConfigDict(strict=True, extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_call(self) -> dict[str, Any]:
        return call_of(self.id, self.function.name, self.function.arguments)


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice


def tool_use(tools: Sequence[ToolBody] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """Raises InvalidRequest."""
    functions = [tool.to_function(position) for position, tool in enumerate(tools or ())]
    definitions = [tool.model_dump(exclude_unset=True) | {"type": "function"} for tool in tools or ()]
    if isinstance(choice, NamedToolChoice):
        return ToolUse.of(functions, definitions, None, choice.function.name, parallel is not False)
    if isinstance(choice, AllowedToolChoice):
        allowed = choice.allowed_tools
        found = ToolUse.of(functions, definitions, allowed.mode, None, parallel is not False)
        return found.limited_to({tool.function.name for tool in allowed.tools}, allowed.mode)
    return ToolUse.of(functions, definitions, choice, None, parallel is not False)
