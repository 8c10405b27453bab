"""Errors in Anthropic's shape: {"type": "error", "error": {"type", "message"}}, with its statuses."""

from __future__ import annotations

from typing import Any

from ....protocol.errors import HalfmoonError, Overloaded, PromptTooLong, RateLimited

ROUTE = "/v1/messages"
OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
NAMES = {"stop": "stop_sequences", "continue_final_message": "messages", "response_format": "output_config.format"}
"""Fields that requests name differently."""


def is_of_messages(path: str) -> bool:
    return path == ROUTE or path.startswith(f"{ROUTE}/")


def messages_status(error: HalfmoonError) -> int:
    """A tenant that used up its minute is limited; a cluster without room is overloaded."""
    return OVERLOADED if isinstance(error, Overloaded) and not isinstance(error, RateLimited) else error.http_status


def messages_error(error: HalfmoonError, status: int | None = None) -> dict[str, Any]:
    """status: that of the reply, where it is another than the error's."""
    status = status or messages_status(error)
    message, param = error.message, error.fields.get("param")
    if param in NAMES:
        message = message.replace(param, NAMES[param])
    if isinstance(error, PromptTooLong) and param == "messages":
        message = f"prompt is too long: {message}"  # by which clients know it
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}
