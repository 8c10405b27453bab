"""Reasoning parsers: <think>…</think> before the answer.

              the prompt ends with <think>   with </think>   with neither
qwen3         reasoning                      content         content, unless <think> comes first
deepseek_r1   reasoning                      content         reasoning; a <think> that comes first is left out
"""

from __future__ import annotations

import re
from typing import ClassVar

from .answer_parts import Content, Part, Reasoning, merged
from .cursor import Reader, Steps
from .formats import Format, TokenOf, marker, optional, sequence, text_before

BEGIN, END = "<think>", "</think>"
TAIL_TOKENS = 16  # of a prompt, in which its last marker stands
_NEWLINES = re.compile(r"\n*")


class ReasoningParser(Reader):
    """Reads one answer. Newlines next to the markers are left out.

    Attributes:
        always: the model reasons unless the prompt says that it is over.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END)
    always: ClassVar[bool]

    def __init__(self, prompt_end: str) -> None:
        super().__init__()
        self._prompt_end = prompt_end
        self._parts: list[Part] = []
        self._newlines = ""  # of the reasoning, held back: the marker may follow

    def push(self, text: str) -> list[Part]:
        self.go_on(text)
        return self._take()

    def finish(self) -> list[Part]:
        self.go_on(None)
        return self._take()

    def read(self) -> Steps[None]:
        cursor = self.cursor
        if not is_over(self._prompt_end):
            cursor.mark()
            yield from cursor.blanks()
            begins = not is_begun(self._prompt_end) and (yield from cursor.found(BEGIN))
            if begins or self.always or is_begun(self._prompt_end):
                blanks = cursor.unmark()
                self._reasoning("" if begins else blanks.lstrip("\n"))
                yield from self._reason()
            else:
                self._content(cursor.unmark())
        yield from cursor.rest(self._content)

    def _reason(self) -> Steps[None]:
        cursor = self.cursor
        yield from self._skip_newlines()
        if (yield from cursor.until(END, self._reasoning)):
            yield from self._skip_newlines()
        else:
            self._parts.append(Reasoning(self._newlines))

    def _skip_newlines(self) -> Steps[None]:
        while (yield from self.cursor.peek()) == "\n":
            self.cursor.run(_NEWLINES)

    def _reasoning(self, text: str) -> None:
        text = self._newlines + text
        kept = text.rstrip("\n")
        self._newlines = text[len(kept) :]
        self._parts.append(Reasoning(kept))

    def _content(self, text: str) -> None:
        self._parts.append(Content(text))

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return merged(parts)

    @classmethod
    def is_of(cls, written: str) -> bool:
        """Whether a chat template with these literals is one for this parser."""
        raise NotImplementedError

    @classmethod
    def before(cls, answer: Format, prompt_end: str, token_of: TokenOf) -> Format:
        """The answer's format with the reasoning that may or will come before it."""
        if is_over(prompt_end):
            return answer
        newlines: Format = {"type": "regex", "pattern": "\\n{0,2}"}
        begin = optional(marker(BEGIN, token_of)) if cls.always else marker(BEGIN, token_of)
        thought = sequence(text_before(END, token_of), newlines)
        if is_begun(prompt_end):
            return sequence(thought, answer)
        thought = sequence(begin, thought)
        return sequence(thought if cls.always else optional(thought), answer)


class Qwen3Parser(ReasoningParser):
    name = "qwen3"
    always = False

    @classmethod
    def is_of(cls, written: str) -> bool:
        return BEGIN in written and END in written and "<|im_start|>" in written


class DeepSeekR1Parser(ReasoningParser):
    name = "deepseek_r1"
    always = True

    @classmethod
    def is_of(cls, written: str) -> bool:
        return END in written and "<｜Assistant｜>" in written


REASONING_PARSERS: dict[str, type[ReasoningParser]] = {parser.name: parser for parser in (Qwen3Parser, DeepSeekR1Parser)}


def is_begun(prompt_end: str) -> bool:
    return prompt_end.rstrip().endswith(BEGIN)


def is_over(prompt_end: str) -> bool:
    return prompt_end.rstrip().endswith(END)
