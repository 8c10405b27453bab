"""Reads text that comes in pieces. Who reads is a generator: it yields where it needs more text, and goes on when more has come.

So a format is read in straight lines, and what is found does not depend on how the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
"""Waits for text, and has a result in the end."""
Give = Callable[[str], None]

_BLANKS = re.compile(r"\s*")


class Cursor:
    """A place in a text whose end has not come yet. What was passed is forgotten, unless a mark stands before it."""

    def __init__(self) -> None:
        self._text = ""
        self._place = 0
        self._mark: int | None = None
        self._closed = False

    def feed(self, text: str) -> None:
        start = self._place if self._mark is None else self._mark
        self._text = self._text[start:] + text
        self._place -= start
        self._mark = None if self._mark is None else 0

    def close(self) -> None:
        """No more text will come."""
        self._closed = True

    def mark(self, back: int = 0) -> None:
        """Keeps the text from here on, or from so many characters before, which no step has been waited for since."""
        self._mark = self._place - back

    def unmark(self) -> str:
        """The text from the mark to here; "" without a mark."""
        start, self._mark = self._mark, None
        return "" if start is None else self._text[start : self._place]

    def skip(self, num_chars: int) -> None:
        """Over characters that have been seen."""
        self._place += num_chars

    def run(self, pattern: re.Pattern[str]) -> str:
        """Passes over what matches, as far as the text has come."""
        found = pattern.match(self._text, self._place)
        text = found[0] if found is not None else ""
        self._place += len(text)
        return text

    def some(self, num_chars: int) -> Steps[str]:
        """The next so many characters, without passing over them; fewer at the end of the text."""
        while len(self._text) - self._place < num_chars and not self._closed:
            yield
        return self._text[self._place : self._place + num_chars]

    def peek(self) -> Steps[str]:
        """The next character; "" at the end of the text."""
        return (yield from self.some(1))

    def word(self, pattern: re.Pattern[str], most: int) -> Steps[str]:
        """What matches next, without passing over it: all that will match, but not more than `most` characters and one."""
        while True:
            found = pattern.match(self._text, self._place)
            text = found[0] if found is not None else ""
            if len(text) > most or self._closed or self._place + len(text) < len(self._text):
                return text[: most + 1]
            yield

    def blanks(self) -> Steps[str]:
        """Passes over white space."""
        found = self.run(_BLANKS)
        while (yield from self.peek()).isspace():
            found += self.run(_BLANKS)
        return found

    def found(self, literal: str) -> Steps[bool]:
        """Passes over the literal if it is next; else it stays where it is."""
        while True:
            text = self._text[self._place : self._place + len(literal)]
            if text == literal:
                self._place += len(literal)
                return True
            if self._closed or not literal.startswith(text):
                return False
            yield

    def until(self, literal: str, give: Give) -> Steps[bool]:
        """Gives the text before the literal, and passes over it. False: it did not come, and all the text was given."""
        while True:
            at = self._text.find(literal, self._place)
            end = at if at >= 0 else len(self._text) - (0 if self._closed else self._begun(literal))
            give(self._text[self._place : end])
            self._place = end
            if at >= 0:
                self._place += len(literal)
                return True
            if self._closed:
                return False
            yield

    def rest(self, give: Give) -> Steps[None]:
        """Gives all the text that is left."""
        while (yield from self.peek()):
            give(self._text[self._place :])
            self._place = len(self._text)

    def _begun(self, literal: str) -> int:
        """How many of the last characters may be the literal's beginning."""
        most = min(len(literal) - 1, len(self._text) - self._place)
        return next((size for size in range(most, 0, -1) if self._text.endswith(literal[:size])), 0)


class Reader:
    """A format: read() says what its text means, one step after the other."""

    def __init__(self) -> None:
        self.cursor = Cursor()
        self._steps = self.read()

    def read(self) -> Steps[None]:
        raise NotImplementedError

    def go_on(self, text: str | None) -> None:
        """With more text; None: at its end."""
        if text is None:
            self.cursor.close()
        else:
            self.cursor.feed(text)
        next(self._steps, None)
