"""An answer's parts as the output items of a response, and the events that tell of each. A whole reply has the items alone.

Reasoning ─► reasoning item      Content ─► message item      CallBegin, CallArguments ─► function_call item
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..requests.choice_text import TokenText
from ..requests.generation import TextDelta
from ..text.answer_form import AnswerForm
from ..text.answer_parts import CallArguments, CallBegin, Content, Part, Reasoning
from .replies import spelled

Event = dict[str, Any]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_TEXTS = {"message": "output_text", "reasoning": "reasoning_text"}


class OutputItems:
    """Items come one after the other; the last one may be open. events are without their sequence_number."""

    def __init__(self, request_id: str, form: AnswerForm | None) -> None:
        """form: None: the answer is plain text."""
        self.items: list[dict[str, Any]] = []
        self.num_reasoning_tokens = 0
        self._request_id = request_id
        self._parser = None if form is None else form.parser()
        self._texts: list[str] = []  # of the open item
        self._open: dict[str, Any] | None = None
        self._num_early = 0  # tokens before what is no reasoning
        self._waiting: list[TokenText] = []  # tokens whose text was held back
        self._logprobs: list[dict[str, Any]] = []  # of the open item's tokens, where they are asked for

    def take(self, delta: TextDelta) -> list[Event]:
        parts: list[Part] = [Content(delta.text)] if self._parser is None else self._parser.push(delta.text)
        self._waiting += delta.token_texts
        # behind another item, what waited was a marker
        is_text = self._parser is None or not self.items or (self._open is not None and self._open["type"] == "message")
        events = self._of(parts, self._waiting if is_text else delta.token_texts)
        if parts and any(isinstance(part, CallBegin) or part.text for part in parts):
            self._waiting = []
        if all(item["type"] == "reasoning" for item in self.items):
            self._num_early += len(delta.token_ids)
        return events

    def end(self, *, complete: bool) -> list[Event]:
        """complete: the answer was not cut off."""
        parts = [] if self._parser is None else self._parser.finish()
        events = self._of(parts, _spelling(parts, self._waiting)) + self._close("completed" if complete else "incomplete")
        if any(item["type"] == "reasoning" for item in self.items):
            self.num_reasoning_tokens = self._num_early
        return events

    def _of(self, parts: list[Part], tokens: Sequence[TokenText]) -> list[Event]:
        """tokens: of the first text among them, with log probabilities."""
        events: list[Event] = []
        for part in parts:
            if isinstance(part, CallBegin):
                fields = {"call_id": part.id, "name": part.name, "arguments": ""}
                events += self._begin("function_call", fields)
            elif part.text:
                events += self._text(part, tokens if isinstance(part, Content) else ())
                tokens = () if isinstance(part, Content) else tokens
        return events

    def _text(self, part: Content | Reasoning | CallArguments, tokens: Sequence[TokenText]) -> list[Event]:
        kind = "message" if isinstance(part, Content) else "reasoning" if isinstance(part, Reasoning) else "function_call"
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events += self._begin(kind, {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []})
            events.append({"type": "response.content_part.added", **self._place(kind), "part": _part(kind, "")})
        self._texts.append(part.text)
        logprobs = [spelled(token) for token in tokens]
        self._logprobs += logprobs
        delta = {**self._place(kind), "delta": part.text}
        if kind == "function_call":
            return [*events, {"type": "response.function_call_arguments.delta", **delta}]
        return [*events, {"type": f"response.{_TEXTS[kind]}.delta", **delta, **({"logprobs": logprobs} if kind == "message" else {})}]

    def _begin(self, kind: str, fields: dict[str, Any]) -> list[Event]:
        events = self._close("completed")
        item_id = f"{_PREFIXES[kind]}_{self._request_id}_{len(self.items)}"
        self._open = {"type": kind, "id": item_id, "status": "in_progress", **fields}
        self._texts, self._logprobs = [], []
        self.items.append(self._open)
        return [*events, {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": self._open}]

    def _close(self, status: str) -> list[Event]:
        """The open item gets its text. Events that were given before keep the item as it was."""
        if self._open is None:
            return []
        kind, text = self._open["type"], "".join(self._texts)
        place = self._place(kind)
        if kind == "function_call":
            item = self._open | {"arguments": text, "status": status}
            events = [{"type": "response.function_call_arguments.done", **place, "name": item["name"], "arguments": text}]
        else:
            part = _part(kind, text, self._logprobs)
            item = self._open | {"content": [part], "status": status}
            done = {"type": f"response.{_TEXTS[kind]}.done", **place, "text": text} | (
                {"logprobs": self._logprobs} if kind == "message" else {}
            )
            events = [done, {"type": "response.content_part.done", **place, "part": part}]
        self._open, self.items[-1] = None, item
        return [*events, {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}]

    def _place(self, kind: str) -> dict[str, Any]:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return place if kind == "function_call" else place | {"content_index": 0}


def _spelling(parts: Sequence[Part], tokens: Sequence[TokenText]) -> list[TokenText]:
    """Those of the tokens that spell the text among the parts; an end-of-sequence token comes after it."""
    num_chars = sum(len(part.text) for part in parts if isinstance(part, Content))
    found: list[TokenText] = []
    for token in tokens:
        if num_chars <= 0:
            break
        found.append(token)
        num_chars -= len(token.text)
    return found


def _part(kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    part = {"type": _TEXTS[kind], "text": text}
    return part | {"annotations": [], "logprobs": list(logprobs)} if kind == "message" else part
