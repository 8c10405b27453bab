"""The functions that a model may call, as a request names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    parameters: Mapping[str, Any]
    """JSON schema of an object."""
    strict: bool = False
    """Calls have to match the schema, even where the model is free to call or not."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """choice: whether the answer has calls; a function: it is one call of that. parallel: there may be several."""

    functions: Sequence[Function] = ()
    definitions: Sequence[Mapping[str, Any]] = ()
    """As the client sent them, for the chat template."""
    choice: Literal["none", "auto", "required"] | Function = "none"
    parallel: bool = True

    @property
    def asks(self) -> bool:
        """There are calls to read."""
        return bool(self.functions) and self.choice != "none"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)


NO_TOOLS = ToolUse()
