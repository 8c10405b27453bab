"""[TOOL_CALLS][{"name": …, "arguments": {…}}, …], or [TOOL_CALLS]name[ARGS]{…} of newer tokenizers: Mistral's models."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Sequence

from ..cursor import Steps
from ..formats import Format, TokenOf, any_of, const, json_of, marker, repeated, sequence, text_with
from ..json_steps import json_value
from ..tools import Function
from .base import ToolParser, json_list, loosened

_BEGIN, _ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_WORD = re.compile(r"[\w.:/-]*")
MAX_WORD_CHARS = 128


class MistralParser(ToolParser):
    name = "mistral"
    markers = (_BEGIN, _ID, _ARGS)

    def read(self) -> Steps[None]:
        cursor = self.cursor
        while (yield from cursor.until(_BEGIN, self._content)):
            cursor.mark(len(_BEGIN))
            yield from cursor.blanks()
            listed = (yield from cursor.peek()) == "["
            if (yield from self._list_of_calls() if listed else self._named_call()):
                cursor.unmark()
            self._give_back()

    def _named_call(self) -> Steps[bool]:
        """False: it is none, or breaks off; the mark stands where that began."""
        cursor = self.cursor
        name = yield from self._word()
        if (yield from cursor.found(_ID)):
            yield from self._word()
        yield from cursor.found(_ARGS)
        yield from cursor.blanks()
        if not name or (yield from cursor.peek()) != "{":
            return False
        self._begin(name)
        return (yield from json_value(cursor, self._argue))

    def _word(self) -> Steps[str]:
        """ "": what comes next is none, or too long a one."""
        word = yield from self.cursor.word(_WORD, MAX_WORD_CHARS)
        if len(word) > MAX_WORD_CHARS:
            return ""
        self.cursor.skip(len(word))
        return word

    @staticmethod
    def make_id() -> str:
        """As the chat template requires it."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    @classmethod
    def is_of(cls, written: str) -> bool:
        return _BEGIN in written

    @classmethod
    def calls(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format:
        """In the form whose special tokens the tokenizer has."""
        one = sequence(marker(_BEGIN, token_of), cls._inside(functions, token_of, many=many))
        return repeated(one) if many and cls._names(token_of) else one

    @classmethod
    def text_with_calls(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format | None:
        inside = cls._inside(loosened(functions), token_of, many=many)
        return text_with(_BEGIN, inside, token_of, many=many and cls._names(token_of))

    @staticmethod
    def _names(token_of: TokenOf) -> bool:
        """The form is name[ARGS]{…}, each call with a marker of its own."""
        return token_of(_ARGS) is not None

    @classmethod
    def _inside(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format:
        if not cls._names(token_of):
            return sequence({"type": "regex", "pattern": " ?"}, json_list(functions, "arguments", many=many))
        return any_of([sequence(const(one.name), marker(_ARGS, token_of), json_of(one.parameters)) for one in functions])
