"""What openapi.json says of messages' replies."""

from __future__ import annotations

from typing import Any, Literal

from ..described import ANY, GENERATING, MEANINGS, Described, ErrorReply
from .errors import OVERLOADED

BEFORE_ROUTE = (408, 429, 431)
"""May come before a route is known, and then have OpenAI's shape."""


class MessagesErrorDetails(Described):
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "timeout_error",
        "overloaded_error",
        "api_error",
    ]
    message: str


class MessagesErrorReply(Described):
    type: Literal["error"]
    error: MessagesErrorDetails


class ContentBlock(Described):
    """text: text. thinking: thinking, signature. tool_use: id, name, input."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessagesUsage(Described):
    input_tokens: int
    """Without those that were cached."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessagesReply(Described):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessagesUsage


class CountTokensReply(Described):
    input_tokens: int


def messages_replies(reply: Any, *statuses: int, **other: Any) -> dict[int | str, dict[str, Any]]:
    """As described.replies, with Anthropic's errors."""
    found: dict[int | str, dict[str, Any]] = {200: {"model": reply, **other}}
    for status in sorted({*ANY, *statuses}):
        model = MessagesErrorReply | ErrorReply if status in BEFORE_ROUTE else MessagesErrorReply
        found[status] = {"model": model, "description": MEANINGS[status]}
    return found


def streamed_messages(reply: Any) -> dict[int | str, dict[str, Any]]:
    """Where `stream` is true the reply is events of these fields."""
    names = "message_start, content_block_start, content_block_delta, content_block_stop, message_delta, message_stop or error"
    fields = {"event": {"type": "string", "description": names}, "data": {"type": "string", "description": "the event's JSON"}}
    event = {"type": "object", "properties": fields, "required": ["event", "data"]}
    return messages_replies(reply, *GENERATING, OVERLOADED, content={"text/event-stream": {"itemSchema": event}})
