"""<tool_call>{"name": …, "arguments": {…}}</tool_call>: Hermes 2 Pro and 3, Qwen2.5, Qwen3, QwQ."""

from __future__ import annotations

from collections.abc import Sequence

from ..cursor import Steps
from ..formats import Format, TokenOf, const, marker, optional, repeated, sequence, text_with
from ..tools import Function
from .base import ToolParser, json_call, loosened

_BEGIN, _END = "<tool_call>", "</tool_call>"
_OTHERS = ("<function=", "<arg_key>", "<parameter=")  # of formats that have the same marker


class HermesParser(ToolParser):
    name = "hermes"
    markers = (_BEGIN, _END)

    def read(self) -> Steps[None]:
        cursor = self.cursor
        while (yield from cursor.until(_BEGIN, self._content)):
            cursor.mark(len(_BEGIN))
            yield from cursor.blanks()
            if (yield from self._call()):
                cursor.mark()
                yield from cursor.blanks()
                if (yield from cursor.found(_END)):
                    cursor.unmark()
            self._give_back()

    @classmethod
    def is_of(cls, written: str) -> bool:
        return _BEGIN in written and "arguments" in written and not any(other in written for other in _OTHERS)

    @classmethod
    def calls(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format:
        one = sequence(marker(_BEGIN, token_of), cls._inside(functions, token_of))
        return repeated(sequence(one, optional(const("\n")))) if many else one

    @classmethod
    def text_with_calls(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format | None:
        return text_with(_BEGIN, cls._inside(loosened(functions), token_of), token_of, many=many)

    @staticmethod
    def _inside(functions: Sequence[Function], token_of: TokenOf) -> Format:
        return sequence(const("\n"), json_call(functions, "arguments"), const("\n"), marker(_END, token_of))
