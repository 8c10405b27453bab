"""The bodies of /v1/messages and /v1/messages/count_tokens, checked by pydantic and turned into a GenerateRequest."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, model_validator

from ....protocol.errors import InvalidRequest, shown
from ....protocol.grammar import Grammar
from ...requests.generate_request import GenerateRequest
from ...text.chat_template import ChatMessage, ChatOptions
from ...text.tools import ToolUse
from ..chat_prompt import ChatPrompt
from ..types import Checked, ContentPart, require_bounded, served
from .blocks import MessageBody, chat_of
from .tools import Tool, ToolChoice, message_tool_use

IGNORED = frozenset(
    "cache_control context_management diagnostics inference_geo metadata service_tier speed user_profile_id workspace_id".split()
)
REFUSED = frozenset(("container", "mcp_servers"))
_REFUSED: dict[str, tuple[Any, ...]] = {name: (False, "", {}) for name in sorted(REFUSED)}  # with what asks for nothing
_HIGHEST = {"max": "xhigh"}  # Anthropic's name for more than xhigh, and the highest effort that templates know
_SAMPLING = ("temperature", "top_k", "top_p")


class Thinking(BaseModel):
    """enabled and disabled are the chat template's switch; adaptive leaves it as it is. A budget changes nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None

    @property
    def variables(self) -> dict[str, bool]:
        """Of chat templates, which know the switch by one name or the other."""
        return {} if self.type == "adaptive" else dict.fromkeys(("enable_thinking", "thinking"), self.type == "enabled")


class OutputConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """A variable of the chat template."""
    format: dict[str, Any] | None = None
    """{"type": "json_schema", "schema": …}"""

    @property
    def grammar(self) -> Grammar | None:
        """Raises InvalidRequest."""
        if self.format is None:
            return None
        if self.format.get("type") != "json_schema" or not isinstance(self.format.get("schema"), dict):
            raise InvalidRequest(
                f'output_config.format is {shown(self.format)}; it must be {{"type": "json_schema", "schema": …}}',
                param="output_config.format",
            )
        return Grammar.of_schema(self.format["schema"])


def _with_dropped_fields(schema: dict[str, Any]) -> None:
    """For openapi.json: fields that a body may have and the model has not."""
    for name in sorted(IGNORED):
        schema["properties"][name] = {"description": "changes nothing"}


class CountTokensBody(ChatPrompt):
    """What a prompt is made of."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_with_dropped_fields)

    model: str | None = None
    messages: Checked[MessageBody]
    system: str | Checked[ContentPart] | None = None
    tools: Checked[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_not_served(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = cast(dict[str, Any], body)
        require_bounded(body)
        return served(body, IGNORED, _REFUSED)

    def _read_chat(self) -> list[ChatMessage]:
        return chat_of(self.messages, self.system)

    def to_generate_request(self) -> GenerateRequest:
        """What has the same prompt. Raises InvalidRequest."""
        return GenerateRequest(model=self.model or "", messages=self.chat, chat=self._options(self.tool_use))

    @property
    def tool_use(self) -> ToolUse:
        """Raises InvalidRequest."""
        return message_tool_use(self.tools, self.tool_choice)

    def _options(self, tools: ToolUse) -> ChatOptions:
        """An assistant's message at the end is continued by the answer."""
        effort = None if self.output_config is None else self.output_config.effort
        return ChatOptions.asked(
            {} if self.thinking is None else self.thinking.variables,
            reasoning_effort=None if effort is None else _HIGHEST.get(effort, effort),
            continue_final_message=self.chat[-1].role == "assistant",
            tools=tools.definitions if tools.asks else (),
        )


class MessagesBody(CountTokensBody):
    max_tokens: int
    stop_sequences: Checked[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None

    def to_generate_request(self) -> GenerateRequest:
        """Raises InvalidRequest."""
        sampling: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.output_config is not None and (grammar := self.output_config.grammar) is not None:
            sampling["grammar"] = grammar
        tools = self.tool_use
        return GenerateRequest(
            model=self.model or "",
            messages=self.chat,
            chat=self._options(tools),
            tools=tools,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or [],
            sampling=sampling,
        )
