"""{"name": …, "parameters": {…}}, several with "; " between them, <|python_tag|> before them or not: Llama 3.1, 3.2 and 3.3."""

from __future__ import annotations

from collections.abc import Sequence

from ..cursor import Steps
from ..formats import Format, TokenOf
from ..tools import Function
from .base import ToolParser, json_call

_TAG = "<|python_tag|>"


class Llama3JsonParser(ToolParser):
    """Without the tag a call begins the answer and is of a function that there is; other JSON is content."""

    name = "llama3_json"
    markers = (_TAG,)
    several = False  # its chat template refuses more

    def read(self) -> Steps[None]:
        cursor = self.cursor
        cursor.mark()
        yield from cursor.blanks()
        if (yield from cursor.peek()) == "{":
            yield from self._calls(known=True)
        self._give_back()
        while (yield from cursor.until(_TAG, self._content)):
            cursor.mark(len(_TAG))
            yield from cursor.blanks()
            yield from self._calls(known=False)
            self._give_back()

    def _calls(self, *, known: bool) -> Steps[None]:
        cursor = self.cursor
        while (yield from self._call(known=known)):
            cursor.mark()
            yield from cursor.blanks()
            yield from cursor.found(";")
            yield from cursor.blanks()
            if (yield from cursor.peek()) != "{":
                return

    @classmethod
    def is_of(cls, written: str) -> bool:
        return '"parameters": dictionary of argument name and its value' in written

    @classmethod
    def calls(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format:
        return json_call(functions, "parameters")
