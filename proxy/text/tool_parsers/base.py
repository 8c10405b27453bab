"""What all tool parsers share: one call in JSON, what is given on, and what is given back as content when it is no call."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from ..answer_parts import CallArguments, CallBegin, Content, Part, merged
from ..cursor import Reader, Steps
from ..formats import Format, TokenOf, any_of, const, json_of, listed, sequence, tag
from ..json_steps import json_value, to_json, whole_string
from ..tools import Function

_NAME = re.compile(r"[\w.:/-]{1,128}")
_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset(("name", "id", "type", "index", *_ARGUMENTS))
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class ToolParser(Reader):
    """Reads one answer. Content that is only white space before or behind a call is left out.

    Attributes:
        markers: texts that the format is told by. Some models have special tokens for them, which then have to be part of the text.
        several: whether an answer may have more than one call; a model whose chat template refuses them has one.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()
    several: ClassVar[bool] = True

    def __init__(self, names: Collection[str]) -> None:
        """names: of the functions that there are."""
        super().__init__()
        self._names = names
        self._parts: list[Part] = []
        self._blanks: str | None = ""  # content held back as long as it is white space; None: there was other content
        self._num_calls = 0

    def push(self, text: str) -> list[Part]:
        self.go_on(text)
        return self._take()

    def finish(self) -> list[Part]:
        self.go_on(None)
        if self._blanks and not self._num_calls:
            self._parts.append(Content(self._blanks))
        return self._take()

    @classmethod
    def is_of(cls, written: str) -> bool:
        """Whether a chat template with these literals tells its model to call in this format."""
        raise NotImplementedError

    @classmethod
    def calls(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format:
        """Calls and nothing else: one, or one and more."""
        raise NotImplementedError

    @classmethod
    def text_with_calls(cls, functions: Sequence[Function], token_of: TokenOf, *, many: bool) -> Format | None:
        """Free text in which calls match their schemas. None: they can't be told from text before they are over."""
        return None

    @staticmethod
    def make_id() -> str:
        return f"call_{secrets.token_hex(12)}"

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return merged(parts)

    def _content(self, text: str) -> None:
        if self._blanks is not None:
            self._blanks += text
            if not self._blanks.strip():
                return
            text, self._blanks = self._blanks, None
        self._parts.append(Content(text))

    def _give_back(self) -> None:
        """What was read since the mark was no call."""
        self._content(self.cursor.unmark())

    def _begin(self, name: str) -> None:
        self.cursor.unmark()
        self._blanks = ""
        self._parts.append(CallBegin(self._num_calls, self.make_id(), name))
        self._num_calls += 1

    def _argue(self, text: str) -> None:
        self._parts.append(CallArguments(self._num_calls - 1, text))

    def _call(self, *, known: bool = False) -> Steps[bool]:
        """{"name": …, "arguments" or "parameters": {…}}, in any order. False: it is none, or breaks off; the mark stands where that began.

        known: only functions that there are can be called, and other keys than those of calls make it something else.
        """
        cursor = self.cursor
        name: str | None = None
        held: str | None = None  # arguments that came before the name
        begun = False
        if not (yield from cursor.found("{")):
            return False
        yield from cursor.blanks()
        separator = ""
        while not (yield from cursor.found("}")):
            if not (yield from cursor.found(separator)):
                return False
            separator = ","
            key = yield from self._key()
            if key is None or (known and key not in _KEYS):
                return False
            if key == "name" and name is None:
                name = yield from whole_string(cursor)
                if name is None or not (name in self._names or (not known and _NAME.fullmatch(name))):
                    return False
            elif key in _ARGUMENTS and held is None and not begun:
                if name is not None and (yield from cursor.peek()) == "{":
                    begun = True
                    if not (yield from self._arguments_of(name)):
                        return False
                elif (held := (yield from self._held_arguments())) is None:
                    return False
            elif not (yield from json_value(cursor, _nowhere)):
                return False
            yield from cursor.blanks()
        if name is None:
            return False
        if not begun:
            self._begin(name)
            self._argue(held or "{}")
        return True

    def _key(self) -> Steps[str | None]:
        cursor = self.cursor
        yield from cursor.blanks()
        key = yield from whole_string(cursor)
        yield from cursor.blanks()
        if key is None or not (yield from cursor.found(":")):
            return None
        yield from cursor.blanks()
        return key

    def _arguments_of(self, name: str) -> Steps[bool]:
        """Given on as they come."""
        self._begin(name)
        whole = yield from json_value(self.cursor, self._argue)
        self.cursor.mark()
        return whole

    def _held_arguments(self) -> Steps[str | None]:
        """An object, or null for none, or the JSON of an object as a string."""
        cursor = self.cursor
        if (yield from cursor.peek()) == '"':
            text = yield from whole_string(cursor)
        else:
            pieces: list[str] = []
            text = "".join(pieces) if (yield from json_value(cursor, pieces.append)) else None
        try:
            found = json.loads(text or "")
        except (ValueError, RecursionError):
            return None
        return to_json({} if found is None else found) if found is None or isinstance(found, dict) else None

    def _list_of_calls(self, *, known: bool = False) -> Steps[bool]:
        """[call, …]; known as in _call. False: it is none, or breaks off; the mark stands where that began."""
        cursor = self.cursor
        if not (yield from cursor.found("[")):
            return False
        while True:
            yield from cursor.blanks()
            if not (yield from self._call(known=known)):
                return False
            cursor.mark()
            yield from cursor.blanks()
            if (yield from cursor.found("]")):
                return True
            if not (yield from cursor.found(",")):
                return False


def json_call(functions: Sequence[Function], key: str) -> Format:
    """{"name": …, key: …} of one of them."""
    return any_of(_json_calls(functions, key))


def json_list(functions: Sequence[Function], key: str, *, many: bool) -> Format:
    """A list of one such call, or of one and more."""
    return sequence(const("["), listed(_json_calls(functions, key), ", ", many=many), const("]"))


def loosened(functions: Sequence[Function]) -> list[Function]:
    """With a schema for those that are strict, and with any object for the others."""
    return [function if function.strict else Function(function.name, ANY_OBJECT) for function in functions]


def _json_calls(functions: Sequence[Function], key: str) -> list[Format]:
    return [tag(f'{{"name": {json.dumps(function.name)}, "{key}": ', json_of(function.parameters), "}") for function in functions]


def _nowhere(text: str) -> None:
    """Where values go that nobody wants."""
