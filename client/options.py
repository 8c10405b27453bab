"""What a request may say, and how it becomes a GenerateRequest: one list for the sync and the async client."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from ..protocol.errors import InvalidRequest
from ..protocol.grammar import grammar_of
from ..protocol.v1 import inference_pb2
from .chat import Message, choice_to_proto, message_to_proto, tool_to_proto

MAX_TIMEOUT_S = 7 * 24 * 3600.0
"""The longest that the proxy takes."""


class Options(TypedDict, total=False):
    """All optional; what is left out takes the server's default, which is that of OpenAI's API.

    ttft_slo_s, tpot_slo_s: to be served within, to the first token and between two; an admission refuses what it predicts to take longer.
    response_format: what the text has to match: {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}},
        or {"type": "regex", "regex": ...}, {"type": "ebnf", "ebnf": ...}, {"type": "choice", "choice": [...]}.
    num_logprobs, num_prompt_logprobs: of each token of the answer, of the prompt, with so many of the likeliest.
        max_tokens may be 0 with the latter.
    bad_words: words of one token that the text has not. skip_special_tokens: false: they have text, too.
    truncate_prompt_tokens: of a longer prompt the last so many tokens are taken; -1: as many as the model takes.
    cache_salt: prefixes are shared with requests of the same salt alone.
    chat_template_kwargs: variables of the model's chat template, such as enable_thinking; reasoning_effort is one, too.
    continue_final_message: the answer continues the last message.
    tools: functions that a chat's answer may call, each {"type": "function", "function": {"name": …, "description": …, "parameters": …}}
        with a JSON schema of its parameters. Choice.tool_calls has the calls; a message of role "tool" with `tool_call_id` brings a result.
    tool_choice: "auto", "none", "required", or {"type": "function", "function": {"name": …}}. parallel_tool_calls: false: at most one call.
    parse_reasoning: a chat's reasoning is told from its text, as it is with tools; Choice.reasoning has it.
    timeout_s: above 0 and at most MAX_TIMEOUT_S; math.inf: no deadline but the proxy's longest, which is the same 7 days.
    """

    model: str
    request_id: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    num_logprobs: int
    num_prompt_logprobs: int
    n: int
    response_format: Mapping[str, Any]
    timeout_s: float
    priority: int
    ttft_slo_s: float
    tpot_slo_s: float
    bad_words: Sequence[str]
    truncate_prompt_tokens: int
    cache_salt: str
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    add_special_tokens: bool
    chat_template_kwargs: Mapping[str, Any]
    reasoning_effort: str
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    parse_reasoning: bool


class Input(TypedDict, total=False):
    """Exactly one of the three."""

    prompt: str
    token_ids: Sequence[int]
    messages: Iterable[Message | Mapping[str, Any]]


class GenerateOptions(Options, Input, total=False):
    """Every keyword of generate() and stream()."""


_ANNOTATIONS: dict[str, Any] = {**Input.__annotations__, **Options.__annotations__}


Method = TypeVar("Method", bound=Callable[..., Any])


def with_options(method: Method) -> Method:
    """help(method) shows every option by its name, in the place of **options, and what GenerateOptions says of them."""
    signature = inspect.signature(method)
    *own, _ = signature.parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(name, kind, default=None, annotation=_written(type_)) for name, type_ in _ANNOTATIONS.items()]
    described: Any = method
    described.__signature__ = signature.replace(parameters=[*own, *options])
    inputs = ", ".join(Input.__annotations__)
    described.__doc__ = f"{inspect.getdoc(method)}\n\nExactly one of {inputs}. {inspect.getdoc(Options)}"
    return method


def build_request(options: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequest, naming the keyword, for one that is unknown or has a value of the wrong type or size."""
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(given.keys() - GenerateOptions.__annotations__.keys())
    if unknown:
        raise InvalidRequest(f"{unknown[0]} is not an option; the options are {', '.join(Options.__annotations__)}", param=unknown[0])
    inputs = [name for name in Input.__annotations__ if name in given]
    if len(inputs) != 1:
        raise InvalidRequest(f"a request has one of prompt, token_ids and messages; this one has {' and '.join(inputs) or 'none'}")
    request = inference_pb2.GenerateRequest()
    for name, value in given.items():
        try:
            _set(request, name, value)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise InvalidRequest(f"{name} is {value!r:.80}: {error}", param=name) from error
    return request


def _set(request: inference_pb2.GenerateRequest, name: str, value: Any) -> None:
    if name == "token_ids":
        request.tokens.SetInParent()
        request.tokens.token_ids.extend(value)
    elif name == "messages":
        request.chat.SetInParent()
        request.chat.messages.extend(message_to_proto(turn) for turn in value)
    elif name == "tools":
        request.tools.extend(tool_to_proto(tool) for tool in value)
    elif name == "tool_choice":
        request.tool_choice.CopyFrom(choice_to_proto(value))
    elif name == "stop":
        request.stop.extend([value] if isinstance(value, str) else value)
    elif name in ("stop_token_ids", "bad_words"):
        if isinstance(value, str):
            raise TypeError("it is a list")
        getattr(request, name).extend(value)
    elif name == "chat_template_kwargs":
        request.chat_template_kwargs = json.dumps(dict(value))
    elif name == "logit_bias":
        request.logit_bias.update(value)
    elif name == "response_format":
        grammar = grammar_of(value)
        if grammar is not None:
            held: Any = request
            held.response_format.kind, held.response_format.text = grammar.kind, grammar.text
    elif name == "timeout_s":
        timeout_s = checked_timeout_s(value)
        request.timeout_s = MAX_TIMEOUT_S if timeout_s is None else timeout_s
    else:
        setattr(request, name, value)


def checked_timeout_s(timeout_s: float) -> float | None:
    """None for math.inf: no deadline. Raises InvalidRequest for NaN, for what is not above 0 and above MAX_TIMEOUT_S."""
    if timeout_s == math.inf:
        return None
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout_s is {timeout_s}; it must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f} (7 days), "
            "or math.inf for no deadline",
            param="timeout_s",
        )
    return timeout_s


def _written(annotation: Any) -> Any:
    """An annotation as it stands in the code."""
    return getattr(annotation, "__forward_arg__", annotation)
