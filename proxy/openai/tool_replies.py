"""Parts of an answer as OpenAI's chats have them: content, reasoning, tool calls.

Reasoning has both names that servers give it: reasoning_content, and the newer reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..text.answer_parts import CallArguments, CallBegin, Content, Part, Reasoning


def delta(part: Part) -> dict[str, Any]:
    """Of a chunk. A call begins with its id and name, and its arguments follow in pieces."""
    if isinstance(part, Content):
        return {"content": part.text}
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text, "reasoning": part.text}
    if isinstance(part, CallBegin):
        return {"tool_calls": [{"index": part.number, **_call(part, "")}]}
    return {"tool_calls": [{"index": part.number, "function": {"arguments": part.text}}]}


def message(parts: Sequence[Part]) -> dict[str, Any]:
    """Of a whole reply, without its role. content is null beside calls where there is none."""
    content = "".join([part.text for part in parts if isinstance(part, Content)])
    reasoning = "".join([part.text for part in parts if isinstance(part, Reasoning)])
    arguments: dict[int, list[str]] = {}
    for part in parts:
        if isinstance(part, CallArguments):
            arguments.setdefault(part.number, []).append(part.text)
    calls = [_call(part, "".join(arguments.get(part.number, ()))) for part in parts if isinstance(part, CallBegin)]
    found: dict[str, Any] = {"content": content or None if calls else content}
    if reasoning:
        found |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return found | ({"tool_calls": calls} if calls else {})


def _call(begin: CallBegin, arguments: str) -> dict[str, Any]:
    return {"id": begin.id, "type": "function", "function": {"name": begin.name, "arguments": arguments}}
