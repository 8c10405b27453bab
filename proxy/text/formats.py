"""Formats of a structural tag: what a grammar of several parts is written in. Plain dictionaries, as xgrammar reads them.

const · json · marker (one special token, or its text) ─► sequence · any_of · repeated ─► Grammar("tools" | "structural_tag", …)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...protocol.grammar import Grammar, compact

Format = dict[str, Any]
TokenOf = Callable[[str], int | None]
"""The id of a special token. None: the text is none, and is written as text."""
MAX_BLANKS = 32  # in a row, between the parts of a JSON text


def const(text: str) -> Format:
    return {"type": "const_string", "value": text}


def json_of(schema: Mapping[str, Any]) -> Format:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_BLANKS}


def sequence(*parts: Format) -> Format:
    return {"type": "sequence", "elements": list(parts)}


def any_of(formats: Sequence[Format]) -> Format:
    return formats[0] if len(formats) == 1 else {"type": "or", "elements": list(formats)}


def repeated(content: Format) -> Format:
    """Once or more."""
    return {"type": "plus", "content": content}


def tag(begin: str, content: Format, end: str) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def listed(tags: Sequence[Format], separator: str, *, many: bool) -> Format:
    """One of them, or one and more."""
    return {
        "type": "tags_with_separator",
        "tags": list(tags),
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not many,
    }


def optional(content: Format) -> Format:
    return {"type": "optional", "content": content}


def marker(text: str, token_of: TokenOf) -> Format:
    token_id = token_of(text)
    return const(text) if token_id is None else {"type": "token", "token": token_id}


def text_with(begin: str, content: Format, token_of: TokenOf, *, many: bool) -> Format:
    """Free text, in which `begin` is followed by the content. Without `many` the text ends behind the first of them."""
    token_id = token_of(begin)
    if token_id is None:
        return {"type": "dispatch", "rules": [[begin, content]], "loop": many}
    return {"type": "token_dispatch", "rules": [[token_id, content]], "loop": many}


def text_before(end: str, token_of: TokenOf) -> Format:
    """Free text, then `end`."""
    token_id = token_of(end)
    closing: Any = end if token_id is None else {"type": "token", "token": token_id}
    return {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": closing}


def format_of(grammar: Grammar) -> Format | None:
    """The grammar as a part of another. None: it can't be one."""
    if grammar.kind == "json_object":
        return json_of({"type": "object"})
    if grammar.kind == "json_schema":
        return json_of(json.loads(grammar.text))
    if grammar.kind == "regex":
        return {"type": "regex", "pattern": grammar.text}
    if grammar.kind == "ebnf":
        return {"type": "grammar", "grammar": grammar.text}
    if grammar.kind == "choice":
        return any_of([const(choice) for choice in json.loads(grammar.text)])
    return json.loads(grammar.text).get("format")


def grammar_of_format(kind: str, found: Format) -> Grammar:
    """Raises InvalidRequest where it is too large."""
    return Grammar(kind, compact({"type": "structural_tag", "format": found}))
