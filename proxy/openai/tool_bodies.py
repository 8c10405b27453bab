"""tools, tool_choice and parallel_tool_calls of a chat, and the calls in its history, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict

from ...protocol.errors import InvalidRequest, shown
from ...protocol.schema_keywords import MAX_DEPTH, require_enforced, without_descriptions
from ..text.tools import NO_TOOLS, Function, ToolUse

MAX_TOOLS = 1024
_NAME = re.compile(r"[\w.:/-]{1,128}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


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
        name, given = self.function.name, self.function.parameters
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{path}.function.name is {shown(name)}; it must be 1 to 128 letters, digits or any of _ . : / -",
                param=f"{path}.function.name",
            )
        parameters = {"type": "object", **given} if given else _NO_PARAMETERS
        _require_schema(parameters, f"{path}.function.parameters", strict=bool(self.function.strict))
        return Function(name, without_descriptions(parameters), bool(self.function.strict))


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class NamedToolChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: NamedFunction


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
        """For the chat template: arguments are an object there, and an empty one where they are no JSON of an object."""
        called = {"name": self.function.name, "arguments": _object(self.function.arguments)}
        return {"type": "function", "function": called} | ({} if self.id is None else {"id": self.id})


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


def tool_use(tools: Sequence[ToolBody] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """Raises InvalidRequest."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice asks for a call, and there are no tools; send tools, or leave it out", param="tool_choice")
        return NO_TOOLS
    functions = [tool.to_function(position) for position, tool in enumerate(tools)]
    by_name = {function.name: function for function in functions}
    if len(by_name) < len(functions):
        twice = next(name for name in by_name if sum(function.name == name for function in functions) > 1)
        raise InvalidRequest(f"tools has {shown(twice)} more than once; give each function a name of its own", param="tools")
    definitions = [tool.model_dump(exclude_unset=True) | {"type": "function"} for tool in tools]
    return ToolUse(functions, definitions, _chosen(choice, by_name), parallel is not False)


def _chosen(choice: ToolChoice | None, by_name: dict[str, Function]) -> Literal["none", "auto", "required"] | Function:
    if not isinstance(choice, NamedToolChoice):
        return choice or "auto"
    name = choice.function.name
    if name not in by_name:
        raise InvalidRequest(
            f"tool_choice names {shown(name)}, which tools has not; it has {shown(', '.join(by_name))}", param="tool_choice"
        )
    return by_name[name]


def _object(arguments: str | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(arguments, dict):
        return arguments
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def _require_schema(schema: dict[str, Any], path: str, *, strict: bool) -> None:
    """strict: a schema that calls can't be held to is refused. Else they are held to it as far as that goes."""
    try:
        if schema.get("type") != "object":
            raise InvalidRequest(f"its type is {shown(schema.get('type'))}; it must be object")
        _require_shallow(schema)
        if strict:
            require_enforced(schema)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error.message}", param=path) from error


def _require_shallow(schema: Any) -> None:
    level: list[Any] = [schema]
    for _ in range(2 * MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (cast(dict[str, Any], value).values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise InvalidRequest(f"it is nested more than {2 * MAX_DEPTH} deep")
