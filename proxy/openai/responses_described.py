"""What openapi.json says of the reply of /v1/responses. A test compares replies with it."""

from __future__ import annotations

from typing import Any, Literal

from .described import GENERATING, CachedTokens, Described, ErrorDetails, Extension, replies


class OutputText(Described):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningText(Described):
    type: Literal["reasoning_text"]
    text: str


class Item(Described):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]


class MessageItem(Item):
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningText]


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    """JSON of an object."""


class WrittenTokens(CachedTokens):
    cache_write_tokens: int
    """Always 0: nothing is charged for them."""


class ReasoningTokens(Described):
    reasoning_tokens: int


class ResponseUsage(Described):
    input_tokens: int
    input_tokens_details: WrittenTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseReply(Described):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[MessageItem | ReasoningItem | CallItem]
    error: ErrorDetails | None
    incomplete_details: dict[str, str] | None
    background: Literal[False]
    previous_response_id: None
    service_tier: Literal["default"]
    store: Literal[False]
    top_logprobs: int
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    halfmoon: Extension | None = None
    """At the end."""
    instructions: str | None
    metadata: dict[str, str]
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    reasoning: dict[str, str | None]
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    tools: list[dict[str, Any]]


def responses_streamed() -> dict[int | str, dict[str, Any]]:
    """As described.streamed; the events are typed, and there is no [DONE]."""
    data = {"type": "string", "description": "an event as OpenAI's; of the last one the whole response"}
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["event", "data"]}
    return replies(ResponseReply, *GENERATING, content={"text/event-stream": {"itemSchema": event}})
