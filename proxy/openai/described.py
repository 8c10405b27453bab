"""What openapi.json says of replies: their fields, every status that a route can answer with, and the event stream.

Replies are made as plain dictionaries (replies.py); a test compares them with these.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

ANY = (400, 405, 408, 429, 431, 500)
"""Of every route. 408, 429 and 431 come before a route is known: a late or large head, too many connections."""
GENERATING = (404, 413, 415, 503, 504)
MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    404: "There is no such model.",
    405: "The route does not take this method.",
    408: "The request did not come whole in time.",
    413: "The body is too large.",
    415: "The body is no JSON, or compressed otherwise than by gzip.",
    429: "Too busy; come back after `retry-after` seconds.",
    431: "The head is too large.",
    500: "A fault of the server.",
    503: "A part of the cluster is missing, or it is shutting down; come back after `retry-after` seconds.",
    504: "The request's own timeout ran out.",
    529: "As 429, of `/v1/messages`.",
}


class Described(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetails(Described):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorReply(Described):
    error: ErrorDetails


class CachedTokens(Described):
    cached_tokens: int


class Usage(Described):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Extension(Described):
    request_id: str
    phases: list[dict[str, Any]]
    """A phase record for each choice."""


class PromptLogprob(Described):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Of each token of a prompt: the likeliest and itself, by their ids; null for the first."""


class Choice(Described):
    index: int
    stop_reason: str | int | None
    """The request's own stop string or token that ended the answer."""
    token_ids: list[int] | None = None
    """With return_token_ids."""


class CompletionChoice(Choice):
    finish_reason: Literal["stop", "length"]
    text: str
    logprobs: dict[str, list[Any]] | None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Spelled(Described):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Spelled):
    top_logprobs: list[Spelled]


class ChatLogprobs(Described):
    content: list[ChatToken]
    refusal: None


class CalledFunction(Described):
    name: str
    arguments: str
    """JSON of an object."""


class ToolCall(Described):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Described):
    role: Literal["assistant"]
    content: str | None
    """Null beside tool calls, where there is none."""
    refusal: None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    """Where the server has a reasoning parser."""
    reasoning: str | None = None
    """The same."""


class ChatChoice(Choice):
    finish_reason: Literal["stop", "length", "tool_calls"]
    message: Message
    logprobs: ChatLogprobs | None


class Envelope(Described):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    halfmoon: Extension


class CompletionReply(Envelope):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatReply(Envelope):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    service_tier: Literal["default"]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ModelReply(Described):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelsReply(Described):
    object: Literal["list"]
    data: list[ModelReply]


class HealthReply(Described):
    status: Literal["ok"]


class TokenizeReply(Described):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """With return_token_strs."""


class DetokenizeReply(Described):
    prompt: str


class VersionReply(Described):
    version: str


class ReadyReply(Described):
    ready: bool
    missing: list[str]


class DescribedApp(FastAPI):
    """Without the 422 that FastAPI adds: a wrong body is a 400 here."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(unused, None)
        return schema


def replies(reply: Any, *statuses: int, **other: Any) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: 200 with `reply`, and the errors of every route and of these statuses.

    other: more of the 200, such as its content of another type.
    """
    errors = {status: {"model": ErrorReply, "description": MEANINGS[status]} for status in sorted({*ANY, *statuses})}
    return {200: {"model": reply, **other}, **errors}


def streamed(reply: Any) -> dict[int | str, dict[str, Any]]:
    """As replies, for a route that generates. Where `stream` is true it answers with events, each of which itemSchema describes."""
    data = {"type": "string", "description": "a chunk as OpenAI's, or an error; of the last event `[DONE]`"}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return replies(reply, *GENERATING, content={"text/event-stream": {"itemSchema": event}})
