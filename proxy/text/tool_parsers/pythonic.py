"""[name(argument=value, …), …]: Llama 4, Llama 3.2 as Meta prompts it, and others that call as Python does."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from typing import Any

from ..cursor import Cursor, Steps
from ..formats import Format, TokenOf
from ..json_steps import to_json
from ..tools import Function
from .base import ToolParser, json_list

_BEGIN, _END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.-]*")
MAX_NAME_CHARS = 128
_OTHERS = re.compile(r"""[^'"()\[\]{}\\]*""")
_JSON_WORDS = {"true": True, "false": False, "null": None}


class PythonicParser(ToolParser):
    """Calls are given on one by one, each with all its arguments: what they are in JSON is known at their end."""

    name = "pythonic"
    markers = (_BEGIN, _END)

    def read(self) -> Steps[None]:
        cursor = self.cursor
        cursor.mark()
        yield from cursor.blanks()
        yield from cursor.found(_BEGIN)
        yield from cursor.blanks()
        first = yield from cursor.some(2)
        if (yield from self._list_of_calls(known=True) if first == "[{" else self._list()):
            cursor.mark()
            yield from cursor.blanks()
            if (yield from cursor.found(_END)):
                cursor.unmark()
        self._give_back()
        yield from cursor.rest(self._content)

    def _list(self) -> Steps[bool]:
        cursor = self.cursor
        if not (yield from cursor.found("[")):
            return False
        while True:
            yield from cursor.blanks()
            name = yield from cursor.word(_NAME, MAX_NAME_CHARS)
            if name not in self._names:
                return False
            cursor.skip(len(name))
            written = (yield from _in_brackets(cursor)) if (yield from cursor.found("(")) else None
            arguments = None if written is None else _as_json(written)
            if arguments is None:
                return False
            self._begin(name)
            self._argue(arguments)
            cursor.mark()
            yield from cursor.blanks()
            if (yield from cursor.found("]")):
                return True
            if not (yield from cursor.found(",")):
                return False

    @classmethod
    def is_of(cls, written: str) -> bool:
        return "[func_name1(" in written

    @classmethod
    def calls(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format:
        """As a list in JSON: a grammar can hold that to the functions' schemas, and Python's form it can't."""
        return json_list(functions, "parameters", many=many)


def _in_brackets(cursor: Cursor) -> Steps[str | None]:
    """The text up to the bracket that closes. None: it does not come."""
    pieces: list[str] = []
    depth = 1
    while True:
        pieces.append(cursor.run(_OTHERS))
        char = yield from cursor.peek()
        if not char:
            return None
        if char in "'\"":
            pieces.append((yield from _quoted(cursor)))
            continue
        depth += (char in "([{") - (char in ")]}")
        cursor.skip(1 if char in "()[]{}\\" else 0)
        if depth == 0:
            return "".join(pieces)
        pieces.append(char if char in "()[]{}\\" else "")


def _quoted(cursor: Cursor) -> Steps[str]:
    """A string with its quotes; without the last one at the end of the text."""
    quote = yield from cursor.peek()
    text = quote
    cursor.skip(1)
    while (char := (yield from cursor.peek())) and char != quote:
        both = (yield from cursor.some(2)) if char == "\\" else char
        cursor.skip(len(both))
        text += both
    cursor.skip(len(char))
    return text + char


def _as_json(arguments: str) -> str | None:
    """Of a call's arguments in Python. None: they are not plain values by name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            call: Any = ast.parse(f"f({arguments})", mode="eval").body
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            return None
        return to_json({keyword.arg: ast.literal_eval(_Plain().visit(keyword.value)) for keyword in call.keywords})
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        return None


class _Plain(ast.NodeTransformer):
    """JSON's words as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_JSON_WORDS[node.id]) if node.id in _JSON_WORDS else node
