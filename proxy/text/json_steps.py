"""Reads JSON that comes in pieces, and gives each piece on as soon as it is known to be JSON.

A raw control character in a string, which models write and JSON forbids, is given on as its escape.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .cursor import Cursor, Give, Steps

MAX_DEPTH = 64
MAX_SCALAR_CHARS = 64
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_SURROGATE = re.compile("[\ud800-\udfff]")
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_CLOSING = {"{": "}", "[": "]"}


def json_value(cursor: Cursor, give: Give, depth: int = 0) -> Steps[bool]:
    """False: what comes next is no JSON. All JSON before it was given, and the cursor stands at the first character that is none."""
    char = yield from cursor.peek()
    if char == '"':
        return (yield from json_string(cursor, give))
    if char in ("{", "["):
        return depth < MAX_DEPTH and (yield from _container(cursor, give, depth))
    word = yield from cursor.word(_WORD, MAX_SCALAR_CHARS)
    if not _SCALAR.fullmatch(word):
        return False
    cursor.skip(len(word))
    give(word)
    return True


def json_string(cursor: Cursor, give: Give) -> Steps[bool]:
    """As json_value."""
    if not (yield from _sign(cursor, give, '"')):
        return False
    while True:
        give(cursor.run(_PLAIN))
        char = yield from cursor.peek()
        if char == '"':
            return (yield from _sign(cursor, give, '"'))
        if char == "\\":
            escape = yield from cursor.some(2)
            escape = (yield from cursor.some(6)) if escape == "\\u" else escape
            if not _ESCAPE.fullmatch(escape):
                return False
            cursor.skip(len(escape))
            give(escape)
        elif not char:
            return False
        elif char < " ":
            cursor.skip(1)
            give(json.dumps(char)[1:-1])


def whole_string(cursor: Cursor) -> Steps[str | None]:
    """A string's own text. None: what comes next is no string of JSON."""
    pieces: list[str] = []
    if not (yield from json_string(cursor, pieces.append)):
        return None
    return json.loads("".join(pieces))


def to_json(value: Any) -> str:
    """Raises ValueError or TypeError for what JSON has not. Half of a surrogate pair, which UTF-8 has not, is an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value, allow_nan=False)


def _container(cursor: Cursor, give: Give, depth: int) -> Steps[bool]:
    opening = yield from cursor.peek()
    closing = _CLOSING[opening]
    yield from _sign(cursor, give, opening)
    give((yield from cursor.blanks()))
    if (yield from _sign(cursor, give, closing)):
        return True
    while True:
        if opening == "{" and not (yield from _key(cursor, give)):
            return False
        if not (yield from json_value(cursor, give, depth + 1)):
            return False
        give((yield from cursor.blanks()))
        if (yield from _sign(cursor, give, closing)):
            return True
        if not (yield from _sign(cursor, give, ",")):
            return False
        give((yield from cursor.blanks()))


def _key(cursor: Cursor, give: Give) -> Steps[bool]:
    """With its colon."""
    if not (yield from json_string(cursor, give)):
        return False
    give((yield from cursor.blanks()))
    if not (yield from _sign(cursor, give, ":")):
        return False
    give((yield from cursor.blanks()))
    return True


def _sign(cursor: Cursor, give: Give, sign: str) -> Steps[bool]:
    if not (yield from cursor.found(sign)):
        return False
    give(sign)
    return True
