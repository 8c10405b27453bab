"""The bodies of OpenAI's two generating routes, checked by pydantic and turned into a GenerateRequest.

known and used       a field here                        known, changes nothing   accepted and dropped (IGNORED)
known, not served    refused, unless empty (REFUSED)     unknown                  refused, with the nearest known name
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator

from ...protocol.errors import InvalidRequest, shown
from ...protocol.sampling import MAX_SEED
from ..requests.choice_text import TextOptions
from ..requests.generate_request import MAX_CHOICES, GenerateRequest
from ..text.chat_template import ChatMessage, ChatOptions
from ..text.tools import MAX_TOOLS, NO_TOOLS, ToolUse
from .chat_prompt import ChatPrompt
from .prompt_scores import PromptForms
from .structured import GUIDED, answer_grammar
from .tool_bodies import ToolBody, ToolCallBody, ToolChoice, tool_use

IGNORED = frozenset("user store metadata service_tier safety_identifier prediction verbosity".split()) | {
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "spaces_between_special_tokens")
}
# field -> values that ask for nothing; null and an empty list never ask for anything
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "web_search_options": (),
    # vLLM's
    "allowed_token_ids": (),
    "chat_template": (),
    "documents": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "prompt_embeds": (),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
    "vllm_xargs": (),
}
MAX_FIELDS = 100
"""In a body. Any honest body has fewer, known and unknown ones together."""
MAX_LENGTHS = {"bad_words": 1024, "logit_bias": 1024, "messages": 2**16, "stop_token_ids": 1024, "tools": MAX_TOOLS}
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "ignore_eos", "stop_token_ids"),
)
HINTS = {
    "prompt": "a string, a list of strings, a list of token ids or a list of lists of token ids",
    "stop": "a string or a list of strings",
    "logit_bias": "an object from token id to a number",
    "tool_choice": 'none, auto, required, {"type": "function", "function": {"name": …}} or {"type": "allowed_tools", "allowed_tools": …}',
}
"""For a field of several types: what it takes, in words."""


class _FirstFault:
    """As pydantic.FailFast, which is not hashable and so can't be part of a union."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return {**handler(source), "fail_fast": True}


Item = TypeVar("Item")
Checked = Annotated[list[Item], _FirstFault()]
"""A list whose check ends at the first wrong item. A million complaints would take seconds to write."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Every chunk says the tokens of its choice so far."""
    include_obfuscation: bool = False
    """Asks for padding against traffic analysis; Halfmoon sends none."""


class SloBody(BaseModel):
    """In seconds. A missing field takes the proxy's own SLO."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ttft: float | None = None
    """To the first token."""
    tpot: float | None = None
    """Between two tokens."""


def _with_dropped_fields(schema: dict[str, Any]) -> None:
    """For openapi.json: fields that a body may have and the model has not."""
    for name in sorted((IGNORED | REFUSED.keys()) - schema["properties"].keys()):
        schema["properties"][name] = {"description": "changes nothing" if name in IGNORED else "not served; a value may ask for nothing"}


def require_bounded(body: Mapping[str, Any], max_lengths: Mapping[str, int] = MAX_LENGTHS) -> None:
    """Raises InvalidRequest for more fields or items than any honest body has."""
    if len(body) > MAX_FIELDS:
        raise InvalidRequest(f"the body has {len(body)} fields; it may have {MAX_FIELDS}")
    for name, limit in max_lengths.items():
        value = body.get(name)
        if isinstance(value, (list, dict)) and len(value) > limit:
            raise InvalidRequest(f"{name} has {len(value)} items; it may have {limit}", param=name)


def served(body: Mapping[str, Any], ignored: Container[str], refused: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields that are neither. Raises InvalidRequest for a refused one, unless its value asks for nothing.

    Args:
        refused: name -> values that ask for nothing; null and an empty list never ask for anything.
    """
    for name, harmless in refused.items():
        value = body.get(name)
        if value is not None and value != [] and value not in harmless:
            raise InvalidRequest(f"{name} is not supported; leave it out", param=name)
    return {name: value for name, value in body.items() if name not in ignored and name not in refused}


class GenerateBody(BaseModel):
    """The fields of both routes. Those below `stream_options` are extensions, with vLLM's names if vLLM has them."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_with_dropped_fields)

    model: str | None = None
    n: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | Checked[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: Checked[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Checked[str] | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = None
    """Of the prompt's tokens, each with so many of the likeliest."""
    priority: int | None = None
    timeout: float | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    slo: SloBody | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_not_served(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = cast(dict[str, Any], body)
        require_bounded(body)
        prompts = body.get("prompt")
        if isinstance(prompts, list) and len(prompts) > MAX_CHOICES and isinstance(prompts[0], (str, list)):
            raise InvalidRequest(f"there are {len(prompts)} prompts; a request may have {MAX_CHOICES} choices", param="prompt")
        fields = cls.model_fields
        refused = {name: harmless for name, harmless in REFUSED.items() if name not in fields}
        return served(body, IGNORED - fields.keys(), refused)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def require_consistent(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true; leave it out or stream", param="stream_options")

    @property
    def prompt_forms(self) -> PromptForms:
        return PromptForms(listed=self.prompt_logprobs)

    def shared_fields(self, num_logprobs: int | None) -> dict[str, Any]:
        """The keywords of GenerateRequest that both routes share."""
        sampling: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.top_k == -1:
            sampling["top_k"] = 0  # vLLM's word for all tokens
        if self.logit_bias:
            sampling["logit_bias"] = _token_keys(self.logit_bias)
        if self.stop_token_ids is not None:
            sampling["stop_token_ids"] = tuple(self.stop_token_ids)
        if num_logprobs is not None:
            sampling["num_logprobs"] = num_logprobs
        if self.prompt_forms.any:
            asked = [num_top for num_top in (self.prompt_forms.echoed, self.prompt_forms.listed) if num_top is not None]
            sampling["num_prompt_logprobs"] = min(asked) if min(asked) < 0 else max(asked)  # what is out of range is refused later
        guided = {name: getattr(self, name) for name in GUIDED}
        if (grammar := answer_grammar(self.response_format, self.structured_outputs, guided)) is not None:
            sampling["grammar"] = grammar
        return {
            "model": self.model or "",
            "n": 1 if self.n is None else self.n,
            "seed": _unsigned(self.seed),
            "max_tokens": self.max_tokens,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
            "timeout_s": self.timeout,
            "priority": self.priority or 0,
            "ttft_slo_s": self.slo.ttft if self.slo is not None else None,
            "tpot_slo_s": self.slo.tpot if self.slo is not None else None,
            "bad_words": self.bad_words or [],
            "text": TextOptions(self.skip_special_tokens is not False, bool(self.include_stop_str_in_output)),
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "cache_salt": self.cache_salt or "",
            "return_token_ids": bool(self.return_token_ids),
            "sampling": sampling,
        }


def _prompt_only(fields: dict[str, Any]) -> dict[str, Any]:
    """max_tokens 0, where the prompt comes back."""
    return {**fields, "max_tokens": 1, "prompt_only": True} if fields["max_tokens"] == 0 else fields


class CompletionBody(GenerateBody):
    prompt: str | Checked[str] | Checked[int] | Checked[Checked[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None
    """Whether a text is begun with BOS, where the model's tokenizer does that; true by default."""

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType] - a list of ints: its first item is one
        return list(self.prompt)  # pyright: ignore[reportReturnType]

    @property
    def prompt_forms(self) -> PromptForms:
        return PromptForms(echoed=self.logprobs if self.echo else None, listed=self.prompt_logprobs)

    def to_generate_request(self) -> GenerateRequest:
        self.require_consistent()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(f"best_of is {self.best_of}, other than n, which is not supported; leave it out", param="best_of")
        fields = self.shared_fields(self.logprobs)
        if self.echo or self.prompt_forms.any:
            fields = _prompt_only(fields)
        return GenerateRequest(prompts=self.prompts, add_special_tokens=self.add_special_tokens is not False, **fields)


class ContentPart(BaseModel):
    """A text, with whatever other servers' clients add to it, such as cache_control. Parts of other types are refused by their type."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None

    def to_text(self, path: str) -> str:
        if self.type != "text":
            raise InvalidRequest(f"{path} is of type {shown(self.type)}; this model takes parts of type 'text' alone", param=path)
        if self.text is None:
            raise InvalidRequest(f"{path} has no text; give it a string", param=path)
        return self.text


_OF_ROLE = {"tool_calls": "assistant", "reasoning_content": "assistant", "reasoning": "assistant", "tool_call_id": "tool"}


class MessageBody(BaseModel):
    """An assistant's message may carry the fields of replies, because clients send replies back."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Checked[ContentPart] | None = None
    name: str | None = None
    tool_calls: Checked[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def to_message(self, position: int) -> ChatMessage:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}) and name != "annotations":
                path = f"messages[{position}].{name[:80]}"
                raise InvalidRequest(f"{path} is not supported; leave it out", param=path)
        for name, role in _OF_ROLE.items():
            if getattr(self, name) and self.role != role:
                path = f"messages[{position}].{name}"
                raise InvalidRequest(f"{path} belongs to a message of role {role!r}, not {self.role!r}; leave it out", param=path)
        if self.content is None and self.role != "assistant":
            raise InvalidRequest(f"messages[{position}] has no content; give it a string", param=f"messages[{position}].content")
        text = self.content
        if not isinstance(text, str):
            path = f"messages[{position}].content"
            text = "\n".join(part.to_text(f"{path}[{index}]") for index, part in enumerate(text or []))
        # few chat templates know "developer", OpenAI's newer name for it
        return ChatMessage("system" if self.role == "developer" else self.role, text, self._extra())

    def _extra(self) -> dict[str, Any]:
        """As vLLM gives them to chat templates."""
        reasoning = self.reasoning_content or self.reasoning
        found = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.to_call() for call in self.tool_calls or ()],
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        return {name: value for name, value in found.items() if value}


class ChatBody(GenerateBody, ChatPrompt):
    messages: Checked[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template, such as enable_thinking."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """A variable of the chat template, too; none also switches thinking off, where the template can."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """The answer continues the last message."""
    tools: Checked[ToolBody] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def _read_chat(self) -> list[ChatMessage]:
        return [message.to_message(position) for position, message in enumerate(self.messages)]

    def to_generate_request(self) -> GenerateRequest:
        self.require_consistent()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true; set it or leave top_logprobs out", param="top_logprobs")
        fields = self.shared_fields((self.top_logprobs or 0) if self.logprobs else None)
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        if self.prompt_forms.any:
            fields = _prompt_only(fields)
        tools = tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)
        return GenerateRequest(messages=self.chat, chat=self.chat_options(tools), tools=tools, **fields)

    def chat_options(self, tools: ToolUse = NO_TOOLS) -> ChatOptions:
        """Raises InvalidRequest."""
        return ChatOptions.asked(
            self.chat_template_kwargs or {},
            reasoning_effort=self.reasoning_effort,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            tools=tools.definitions if tools.asks else (),
        )


def _token_keys(biases: dict[str, float]) -> dict[int, float]:
    wrong = next((key for key in biases if not key.isdecimal() or not key.isascii()), None)
    if wrong is not None:
        raise InvalidRequest(f"logit_bias has the key {shown(wrong)}; its keys are token ids", param="logit_bias")
    return {int(key): bias for key, bias in biases.items()}


def _unsigned(seed: int | None) -> int | None:
    """OpenAI's seeds are signed 64-bit numbers. Each maps to an unsigned one of its own."""
    return seed & MAX_SEED if seed is not None and -(2**63) <= seed < 0 else seed
