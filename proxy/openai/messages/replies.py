"""An answer as a message of content blocks, whole or as typed events.

parts: Content · Reasoning · CallBegin, CallArguments …
  ├─► whole: text · thinking · tool_use blocks
  └─► message_start ─► (content_block_start ─► content_block_delta … ─► content_block_stop) … ─► message_delta ─► message_stop
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from ....protocol.errors import HalfmoonError
from ....protocol.v1 import common_pb2
from ...requests.generation import ChoiceEnd, Generation, GenerationEvent
from ...text.answer_form import AnswerForm
from ...text.answer_parts import CallArguments, CallBegin, Content, Part, Reasoning
from ..encoded import to_json
from ..event_writer import EventWriter
from .errors import messages_error

NO_SIGNATURE = ""  # of thinking, which nobody here checks


class AnswerReader:
    """What the events of one choice say."""

    def __init__(self, form: AnswerForm | None) -> None:
        """form: None: the answer is plain text."""
        self._parser = None if form is None else form.parser()

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.has_calls

    def parts(self, event: GenerationEvent) -> list[Part]:
        if isinstance(event, ChoiceEnd):
            return [] if self._parser is None else self._parser.finish()
        if self._parser is None:
            return [Content(event.text)] if event.text else []
        return self._parser.push(event.text)


def content_blocks(parts: Sequence[Part]) -> list[dict[str, Any]]:
    arguments: dict[int, list[str]] = {}
    for part in parts:
        if isinstance(part, CallArguments):
            arguments.setdefault(part.number, []).append(part.text)
    blocks: list[dict[str, Any]] = []
    for _, run in itertools.groupby((part for part in parts if not isinstance(part, CallArguments)), key=type):
        first, *others = run
        if isinstance(first, CallBegin):
            calls = [part for part in (first, *others) if isinstance(part, CallBegin)]
            blocks += [_block(call) | {"input": _object("".join(arguments.get(call.number, ())))} for call in calls]
        elif text := "".join([part.text for part in (first, *others) if not isinstance(part, CallBegin)]):
            blocks.append(_block(first._replace(text=text)))
    return blocks


class MessageWriter(EventWriter):
    def __init__(self, generation: Generation, path: str) -> None:
        super().__init__(generation, path)
        self._reader = AnswerReader(generation.form)
        self._open: type[Part] | None = None  # what the open block is made of
        self._num_blocks = 0

    async def whole(self) -> list[bytes]:
        parts, end = list[Part](), None
        while events := await self._generation.next_events():
            for event in events:
                parts += self._reader.parts(event)
                end = event if isinstance(event, ChoiceEnd) else end
        assert end is not None, "a generation ends with its choice"
        message = _message(self._generation, content_blocks(parts)) | _ended(end, self._reader) | {"usage": _usage(end)}
        return [to_json(message).encode()]

    async def _written(self, events: Sequence[GenerationEvent]) -> bytes:
        found = b"".join([self._of(event) for event in events])
        return self._start() + found if found and not self._begun else found

    def _failed(self, error: HalfmoonError) -> bytes:
        return _event(messages_error(error))

    def _start(self) -> bytes:
        # how many tokens are cached is known at the end
        usage = {"input_tokens": self._generation.num_prompt_tokens, **_UNCACHED, "output_tokens": 0}
        message = _message(self._generation, []) | {"stop_reason": None, "stop_sequence": None, "usage": usage}
        return _event({"type": "message_start", "message": message})

    def _of(self, event: GenerationEvent) -> bytes:
        found = b"".join([self._part(part) for part in self._reader.parts(event)])
        if not isinstance(event, ChoiceEnd):
            return found
        delta = _event({"type": "message_delta", "delta": _ended(event, self._reader), "usage": _usage(event)})
        return found + self._closed() + delta + _event({"type": "message_stop"})

    def _part(self, part: Part) -> bytes:
        if isinstance(part, CallBegin):
            return self._opened(part)
        if not part.text:
            return b""
        opened = self._opened(part) if not isinstance(part, CallArguments) and type(part) is not self._open else b""
        return opened + _event({"type": "content_block_delta", "index": self._num_blocks - 1, "delta": _delta(part)})

    def _opened(self, part: Content | Reasoning | CallBegin) -> bytes:
        closed = self._closed()
        self._open = type(part)
        self._num_blocks += 1
        empty = part if isinstance(part, CallBegin) else part._replace(text="")
        return closed + _event({"type": "content_block_start", "index": self._num_blocks - 1, "content_block": _block(empty)})

    def _closed(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event({"type": "content_block_stop", "index": self._num_blocks - 1})


_UNCACHED = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}


def _message(generation: Generation, content: list[dict[str, Any]]) -> dict[str, Any]:
    head = {"id": f"msg_{generation.request_id}", "type": "message", "role": "assistant"}
    return head | {"model": generation.model, "content": content}


def _block(part: Content | Reasoning | CallBegin) -> dict[str, Any]:
    if isinstance(part, Content):
        return {"type": "text", "text": part.text}
    if isinstance(part, Reasoning):
        return {"type": "thinking", "thinking": part.text, "signature": NO_SIGNATURE}
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}


def _delta(part: Content | Reasoning | CallArguments) -> dict[str, Any]:
    if isinstance(part, Content):
        return {"type": "text_delta", "text": part.text}
    if isinstance(part, Reasoning):
        return {"type": "thinking_delta", "thinking": part.text}
    return {"type": "input_json_delta", "partial_json": part.text}


def _ended(end: ChoiceEnd, reader: AnswerReader) -> dict[str, Any]:
    if end.reason == common_pb2.FINISH_REASON_LENGTH:
        reason = "max_tokens"
    elif end.matched_stop is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if reader.has_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": end.matched_stop}


def _usage(end: ChoiceEnd) -> dict[str, Any]:
    """Anthropic counts cached tokens by themselves."""
    cached = end.usage.num_cached_tokens
    read = {"input_tokens": end.usage.num_prompt_tokens - cached, **_UNCACHED, "cache_read_input_tokens": cached}
    return read | {"output_tokens": end.usage.num_completion_tokens}


def _object(arguments: str) -> dict[str, Any]:
    """Arguments that break off are no JSON; their call has no input then, and stop_reason says why."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}


def _event(value: dict[str, Any]) -> bytes:
    return f"event: {value['type']}\ndata: {to_json(value)}\n\n".encode()
