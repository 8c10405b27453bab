"""The body of POST /v1/responses, turned into a chat's. Nothing is stored: each request brings its whole conversation.

input, instructions ─► messages       tools (flat) ─► tools       text.format ─► response_format       the rest by its own name
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...protocol.errors import InvalidRequest, shown
from ..requests.generate_request import GenerateRequest
from ..text.chat_template import ChatMessage
from ..text.tools import MAX_TOOLS
from .chat_prompt import ChatPrompt
from .responses_items import Input, to_messages
from .tool_bodies import AllowedTool, AllowedToolChoice, AllowedTools, FunctionBody, NamedFunction, NamedToolChoice, ToolBody
from .types import ChatBody, Checked, SloBody, require_bounded, served

IGNORED = frozenset("user service_tier safety_identifier max_tool_calls stream_options".split()) | {
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
}
# field -> values that ask for nothing; null and an empty list never ask for anything
REFUSED: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "context_management": (),
    "conversation": (),
    "image": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "store": (False,),
    "truncation": ("disabled",),
}
_PARAMS = {
    "max_tokens": "max_output_tokens",
    "num_logprobs": "top_logprobs",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""A chat's field -> the one that it came from."""
HINTS = {"tool_choice": 'none, auto, required, {"type": "function", "name": …} or {"type": "allowed_tools", "mode": …, "tools": …}'}
"""For a field of several types: what it takes, in words."""
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
MAX_LENGTHS = {"include": 100, "input": 2**16, "tools": MAX_TOOLS}
_AS_IN_CHATS = (
    *("model", "temperature", "top_p", "presence_penalty", "frequency_penalty", "parallel_tool_calls", "stream"),
    *("seed", "stop", "top_k", "min_p", "repetition_penalty", "ignore_eos", "chat_template_kwargs"),
    *("cache_salt", "priority", "timeout", "slo"),
)


class FunctionTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of an object; none: there are no parameters."""
    strict: bool | None = None
    """Null is false."""

    def to_tool(self, position: int) -> ToolBody:
        path = f"tools[{position}]"
        if self.type != "function":
            raise InvalidRequest(f"{path} is of type {shown(self.type)}, which is not supported; it must be of type function", param=path)
        if self.name is None:
            raise InvalidRequest(f"{path}.name is missing", param=f"{path}.name")
        found = {name: value for name in ("description", "parameters", "strict") if (value := getattr(self, name)) is not None}
        return ToolBody(type="function", function=FunctionBody(name=self.name, **found))


class FunctionChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    name: str


class AllowedChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]

    def to_chat(self) -> AllowedToolChoice:
        tools = [AllowedTool(type="function", function=NamedFunction(name=tool.name)) for tool in self.tools]
        return AllowedToolChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=self.mode, tools=tools))


class TextFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def to_response_format(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        if self.schema_ is None:
            raise InvalidRequest("text.format.schema is missing", param="text.format.schema")
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_}}


class TextOptionsBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Changes nothing."""


class ReasoningOptions(BaseModel):
    """Nothing but effort changes anything: reasoning is given whole, and has no summary."""

    model_config = ConfigDict(strict=True, extra="forbid")

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


def _with_dropped_fields(schema: dict[str, Any]) -> None:
    """For openapi.json: fields that a body may have and the model has not."""
    for name in sorted(IGNORED | REFUSED.keys()):
        schema["properties"][name] = {"description": "changes nothing" if name in IGNORED else "not served; a value may ask for nothing"}


class ResponsesBody(ChatPrompt):
    """Those below `stream` are extensions, as in chats."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_with_dropped_fields)

    model: str | None = None
    input: Input
    instructions: str | None = None
    tools: Checked[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptionsBody | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: int | None = None
    include: list[str] | None = None
    """message.output_text.logprobs; reasoning.encrypted_content changes nothing, because reasoning comes and goes as text."""
    top_logprobs: int | None = None
    """Of each token of the text; asks for its log probabilities by itself."""
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, str] | None = None
    """Comes back in the reply."""
    stream: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | Checked[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout: float | None = None
    slo: SloBody | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_not_served(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = cast(dict[str, Any], body)
        require_bounded(body, MAX_LENGTHS)
        return served(body, IGNORED, REFUSED)

    def _read_chat(self) -> list[ChatMessage]:
        return to_messages(self.instructions, self.input)

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def to_generate_request(self) -> GenerateRequest:
        """Raises InvalidRequest; told_by_own_names() gives a chat's fields in it their names here."""
        for name in self.include or ():
            if name not in INCLUDED:
                raise InvalidRequest(f"include has {shown(name)}, which is not supported; leave it out", param="include")
        asked: dict[str, Any] = {name: getattr(self, name) for name in _AS_IN_CHATS}
        if self.text is not None and self.text.format is not None:
            asked["response_format"] = self.text.format.to_response_format()
        if self.tools is not None:
            asked["tools"] = [tool.to_tool(position) for position, tool in enumerate(self.tools)]
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
        elif isinstance(choice, AllowedChoice):
            choice = choice.to_chat()
        if self.wants_logprobs:
            asked |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        effort = None if self.reasoning is None else self.reasoning.effort
        chat = ChatBody.model_construct(
            messages=[], max_tokens=self.max_output_tokens, tool_choice=choice, reasoning_effort=effort, **asked
        )
        chat.chat = self.chat
        return chat.to_generate_request()


@contextlib.contextmanager
def told_by_own_names() -> Iterator[None]:
    """An InvalidRequest that names a field of the chat names the one that it came from."""
    try:
        yield
    except InvalidRequest as error:
        param = error.fields.get("param")
        if not isinstance(param, str):
            raise
        own = _PARAMS.get(param, param.replace("].function.", "]."))  # a chat has a tool's name and parameters inside its function
        raise type(error)(error.message.replace(param, own), **{**error.fields, "param": own}) from error
