"""Reads streamed chunks: whether a chunk brought tokens, how the answer ended, what the server counted, what went wrong."""

from __future__ import annotations

import json
from typing import Any, cast

from .sample import Sample

DONE = b"[DONE]"
TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")


class ChunkReader:
    """Fills a sample from the events of its stream."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self.done = False

    def take(self, event: bytes, now_s: float) -> None:
        """now_s: when its bytes were read, in seconds after the request was sent."""
        sample = self._sample
        if event == DONE:
            self.done = True
            return
        try:
            chunk: dict[str, Any] = json.loads(event)
        except ValueError:
            sample.error = f"an event that is not JSON: {event[:200]!r}"
            return
        if chunk.get("error"):
            sample.error = error_text(chunk["error"])
            return
        if chunk.get("usage"):
            self._count(chunk["usage"])
        for choice in chunk.get("choices") or ():
            self._choice(choice, now_s)
        extension = chunk.get("halfmoon")
        if extension and extension.get("phases"):
            sample.phases = extension["phases"][0]

    def _choice(self, choice: dict[str, Any], now_s: float) -> None:
        sample = self._sample
        delta: dict[str, Any] = choice.get("delta") or {}
        text: Any = choice.get("text") or next((delta[name] for name in TEXT_FIELDS if delta.get(name)), "")
        reason = choice.get("finish_reason")
        # A chunk without text, reason or role is a token that has no text (yet). One with a reason and without text is an end, which a
        # server may send some time after the last token.
        if text or (reason is None and "role" not in delta):
            sample.arrivals_s.append(now_s)
        if reason:
            sample.finish_reason = reason

    def _count(self, usage: dict[str, Any]) -> None:
        sample = self._sample
        sample.prompt_tokens = usage.get("prompt_tokens")
        sample.completion_tokens = usage.get("completion_tokens")
        details: dict[str, Any] = usage.get("prompt_tokens_details") or {}
        sample.cached_tokens = details.get("cached_tokens")


def error_text(error: Any) -> str:
    if isinstance(error, dict):
        fields = cast(dict[str, Any], error)
        code, message = fields.get("code"), fields.get("message")
        if message is None:
            return json.dumps(fields)[:500]
        return (f"{code}: {message}" if code else str(message))[:500]
    return str(error)[:500]
