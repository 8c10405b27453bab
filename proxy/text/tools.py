"""The functions that a model may call, as a request names them, and the calls in its history."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ...protocol.errors import InvalidRequest, shown
from ...protocol.schema_keywords import MAX_DEPTH, require_enforced, without_descriptions

MAX_TOOLS = 1024
_NAME = re.compile(r"[\w.:/-]{1,128}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    parameters: Mapping[str, Any]
    """JSON schema of an object."""
    strict: bool = False
    """Calls have to match the schema, even where the model is free to call or not."""

    @classmethod
    def checked(cls, name: str, parameters: Mapping[str, Any] | None, strict: bool, path: str) -> Function:
        """path: of the function in its request. Raises InvalidRequest."""
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{path}.name is {shown(name)}; it must be 1 to 128 letters, digits or any of _ . : / -", param=f"{path}.name"
            )
        schema = {"type": "object", **parameters} if parameters else _NO_PARAMETERS
        _require_schema(schema, f"{path}.parameters", strict=strict)
        return cls(name, without_descriptions(schema), strict)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """choice: whether the answer has calls; a function: it is one call of that. parallel: there may be several."""

    functions: Sequence[Function] = ()
    definitions: Sequence[Mapping[str, Any]] = ()
    """As the client sent them, for the chat template."""
    choice: Literal["none", "auto", "required"] | Function = "none"
    parallel: bool = True
    limited: bool = False
    """The functions are some of those that the model is told of, and calls are held to them where they can be."""

    @classmethod
    def of(
        cls,
        functions: Sequence[Function],
        definitions: Sequence[Mapping[str, Any]],
        choice: Literal["none", "auto", "required"] | None,
        called: str | None,
        parallel: bool,
    ) -> ToolUse:
        """called: the name of the function that is to be called, in the place of a choice. Raises InvalidRequest."""
        if not functions:
            if called is not None or choice == "required":
                raise InvalidRequest(
                    "tool_choice asks for a call, and there are no tools; send tools, or leave it out", param="tool_choice"
                )
            return NO_TOOLS
        by_name = {function.name: function for function in functions}
        if len(by_name) < len(functions):
            twice = next(name for name in by_name if sum(function.name == name for function in functions) > 1)
            raise InvalidRequest(f"tools has {shown(twice)} more than once; give each function a name of its own", param="tools")
        if called is not None and called not in by_name:
            raise InvalidRequest(
                f"tool_choice names {shown(called)}, which tools has not; it has {shown(', '.join(by_name))}", param="tool_choice"
            )
        return cls(functions, definitions, choice or "auto" if called is None else by_name[called], parallel)

    def limited_to(self, names: Collection[str], mode: Literal["auto", "required"]) -> ToolUse:
        """Only these may be called; the model is told of all, so that its prompt stays the same. Raises InvalidRequest."""
        unknown = [name for name in names if name not in self.names]
        if unknown or not names:
            told = f"names {shown(unknown[0])}, which tools has not" if unknown else "allows no tool"
            raise InvalidRequest(f"tool_choice {told}; name some of {shown(', '.join(sorted(self.names)))}", param="tool_choice")
        return dataclasses.replace(
            self, functions=[function for function in self.functions if function.name in names], choice=mode, limited=True
        )

    @property
    def asks(self) -> bool:
        """There are calls to read."""
        return bool(self.functions) and self.choice != "none"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)


NO_TOOLS = ToolUse()


def call_of(call_id: str | None, name: str, arguments: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """A call of an earlier answer, for the chat template: arguments are an object there, an empty one where they are no JSON of one."""
    called = {"name": name, "arguments": _object(arguments)}
    return {"type": "function", "function": called} | ({} if call_id is None else {"id": call_id})


def _object(arguments: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if isinstance(arguments, Mapping):
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
