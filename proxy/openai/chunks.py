"""A generation as server-sent events, with all chunks of a step in one piece of bytes.

Chunks that only add text differ in nothing but the text. Their JSON is therefore made once for each choice, and the escaped
text is put in: head + "…" + tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

from ...protocol.errors import HalfmoonError
from ..requests.generation import ChoiceEnd, Generation, GenerationEvent, TextDelta
from ..text.answer_parts import Content, Part
from .encoded import to_json
from .errors import error_body
from .event_writer import EventWriter
from .replies import Shape, WholeChoice

DONE = b"data: [DONE]\n\n"
_HOLE = "\0"  # stands in a frame where the text goes


def to_event(value: Any) -> bytes:
    return f"data: {to_json(value)}\n\n".encode()


class ChunkWriter(EventWriter):
    """usage: a chunk of it at the end. running_usage: every chunk says the tokens of its choice so far."""

    def __init__(self, generation: Generation, shape: Shape, path: str, *, usage: bool = False, running_usage: bool = False) -> None:
        super().__init__(generation, path)
        self._shape = shape
        self._wants_usage = usage
        self._running_usage = running_usage
        self._num_tokens: dict[int, int] = {}  # of the choices, so far
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # of the choices that have begun
        self._ends: list[ChoiceEnd] = []

    async def whole(self) -> list[bytes]:
        choices = [WholeChoice(index) for index in range(self._generation.num_choices)]
        while events := await self._generation.next_events():
            for event in events:
                choice = choices[event.index]
                if isinstance(event, ChoiceEnd):
                    choice.end = event
                    choice.parts.extend(self._shape.parts(event.index, None))
                else:
                    choice.texts.append(event.text)
                    choice.parts.extend(self._shape.parts(event.index, event.text))
                    choice.token_texts.extend(event.token_texts)
                    choice.token_ids.extend(event.token_ids)
        return await self._shape.whole_json(choices)

    async def _written(self, events: Sequence[GenerationEvent]) -> bytes:
        found = b"" if events else self._last()
        for event in events:
            if event.index not in self._frames:
                found += await self._opening(event.index)
            found += self._of(event)
        return found

    def _failed(self, error: HalfmoonError) -> bytes:
        return to_event(error_body(error, self._path))

    def _of(self, event: GenerationEvent) -> bytes:
        if isinstance(event, ChoiceEnd):
            self._ends.append(event)
            held = b"".join(self._part(event.index, part) for part in self._shape.parts(event.index, None))
            return held + self._event(self._shape.last_chunk(event), event.index)
        if self._running_usage:
            self._num_tokens[event.index] = self._num_tokens.get(event.index, 0) + len(event.token_ids)
        if self._shape.reads:
            return self._read(self._frames[event.index], event)
        if event.token_texts or ((self._running_usage or self._shape.wants_token_ids) and event.token_ids):
            return self._event(self._shape.chunk(event.index, event.text, event.token_texts, event.token_ids), event.index)
        return self._text(self._frames[event.index], event.text) if event.text else b""

    def _read(self, frame: tuple[bytes, bytes], event: TextDelta) -> bytes:
        """The text as what it means. The first chunk has the step's tokens, where they are asked for."""
        parts: list[Part | None] = [*self._shape.parts(event.index, event.text)]
        wants_tokens = bool(event.token_texts) or ((self._running_usage or self._shape.wants_token_ids) and bool(event.token_ids))
        if not wants_tokens:
            return b"".join(self._text(frame, part.text) if isinstance(part, Content) else self._part(event.index, part) for part in parts)
        first, *others = parts or [None]
        chunk = self._shape.part_chunk(event.index, first, event.token_texts, event.token_ids)
        return self._event(chunk, event.index) + b"".join(self._part(event.index, part) for part in others)

    def _part(self, index: int, part: Part | None) -> bytes:
        return self._event(self._shape.part_chunk(index, part, (), ()), index)

    async def _opening(self, index: int) -> bytes:
        """The events that come before a choice's first text; makes the frame of its text."""
        head, hole, tail = self._event(self._shape.chunk(index, _HOLE, []), index).partition(to_json(_HOLE).encode())
        assert hole, "a chunk's text does not stand in it"
        self._frames[index] = (head, tail)
        return b"".join([self._event(chunk, index) async for chunk in self._shape.openings(index)])

    def _text(self, frame: tuple[bytes, bytes], text: str) -> bytes:
        head, tail = frame
        return b"".join((head, encode_basestring(text).encode(), tail))

    def _last(self) -> bytes:
        return (to_event(self._shape.usage_chunk(self._ends)) if self._wants_usage else b"") + DONE

    def _event(self, chunk: dict[str, Any], index: int) -> bytes:
        """With include_usage every chunk of OpenAI's carries the field; it is null in all but the last, unless it runs."""
        if self._running_usage:
            return to_event(chunk | {"usage": self._shape.running_usage(index, self._num_tokens.get(index, 0))})
        return to_event(chunk | {"usage": None} if self._wants_usage else chunk)
