"""halfmoon.v1.Inference: the gRPC face, what the SDK speaks to.

Generate ─► GenerateRequest ─► Generation ─► Admitted, Delta …, Finished a choice      the stream's end cancels what is left
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..protocol.errors import HalfmoonError, InvalidRequest, shown
from ..protocol.grammar import Grammar
from ..protocol.grpc_errors import client_left, unary_boundary
from ..protocol.trace_context import TraceContext
from ..protocol.v1 import inference_pb2, inference_pb2_grpc
from .request_process import LARGE_BYTES, Packed, RequestProcess, pack, unpack_messages, unpack_prompts
from .requests.choice_text import TextOptions, TokenText
from .requests.generate_request import GenerateRequest
from .requests.generation import Generation, GenerationEvent, Generator, TextDelta
from .requests.prompt_text import PromptToken
from .slow_reader import Write, watched
from .tenants.gate import Gate
from .tenants.tenant import Tenant
from .text.answer_form import AnswerParser
from .text.answer_parts import CallArguments, CallBegin, Content, Part, Reasoning
from .text.chat_template import ChatMessage, ChatOptions
from .text.tools import MAX_TOOLS, NO_TOOLS, Function, ToolUse, call_of

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
MAX_MESSAGES = 2**16
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "ignore_eos", "num_logprobs", "num_prompt_logprobs"),
)


Handler = Callable[["InferenceService", Any, grpc.aio.ServicerContext], Awaitable[Any]]


def _counted(handler: Handler) -> Handler:
    """A servicer method whose calls are counted, by how they end."""

    @functools.wraps(handler)
    async def counted(self: InferenceService, request: Any, context: grpc.aio.ServicerContext) -> Any:
        status = grpc.StatusCode.INTERNAL
        try:
            reply = await handler(self, request, context)
            status = grpc.StatusCode.OK
            return reply
        except HalfmoonError as error:
            status = error.grpc_status
            self._faces.refused("grpc", error.code)
            raise
        except (asyncio.CancelledError, grpc.aio.InternalError) as error:
            if isinstance(error, asyncio.CancelledError) or client_left(error):
                status = grpc.StatusCode.CANCELLED
            raise
        finally:
            self._faces.grpc_call(handler.__name__, status.name)

    return counted


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, generator: Generator, process: RequestProcess, gate: Gate | None = None) -> None:
        """gate: asks each call for an API key. None: nobody is asked."""
        self._gate = gate
        self._generator = generator
        self._faces = generator.router.metrics.faces
        self._process = process

    def add_to(self, server: grpc.aio.Server) -> None:
        """As inference_pb2_grpc's own registration, but Generate gets its request as bytes, because parsing a large one takes long."""
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.Generate, response_serializer=inference_pb2.GenerateReply.SerializeToString
            ),
            "Cancel": grpc.unary_unary_rpc_method_handler(
                self.Cancel, inference_pb2.CancelRequest.FromString, inference_pb2.CancelReply.SerializeToString
            ),
            "Models": grpc.unary_unary_rpc_method_handler(
                self.Models, inference_pb2.ModelsRequest.FromString, inference_pb2.ModelsReply.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    # a coroutine that writes, not a generator: what it holds is freed at the end of the stream, not when the collector gets to it
    @unary_boundary
    @_counted
    async def Generate(self, content: bytes, context: grpc.aio.ServicerContext) -> None:
        tenant = self._tenant(context)
        generation = await self._generator.open(dataclasses.replace(await self._request(content, context), tenant=tenant))
        limit_s = self._generator.router.config.write_timeout_s
        async with generation:
            with watched(context.write, limit_s, generation.cancel) as write:
                await self._write_all(generation, write)

    async def _write_all(self, generation: Generation, write: Write) -> None:
        admitted = inference_pb2.GenerateReply.Admitted(
            request_id=generation.request_id, model=generation.model, num_prompt_tokens=generation.num_prompt_tokens
        )
        await write(inference_pb2.GenerateReply(admitted=admitted))
        form, begun = generation.form, set[int]()
        parsers = [] if form is None else [form.parser() for _ in range(generation.num_choices)]
        while events := await generation.next_events():
            for event in events:
                if generation.is_scored and event.index not in begun:
                    begun.add(event.index)
                    async for part in generation.prompt_text(event.index).parts():
                        await write(_prompt(event.index, part))
                for reply in [_reply(event)] if not parsers else _read(parsers[event.index], event):
                    await write(reply)

    def _tenant(self, context: grpc.aio.ServicerContext) -> Tenant | None:
        """Whose call it is. Raises Unauthenticated."""
        return None if self._gate is None else self._gate.tenant_of_call(context.invocation_metadata() or ())

    async def _request(self, content: bytes, context: grpc.aio.ServicerContext) -> GenerateRequest:
        """Raises InvalidRequest."""
        trace = TraceContext.from_metadata(context.invocation_metadata())
        if len(content) <= LARGE_BYTES:
            return dataclasses.replace(parse_request(content), trace=trace)
        packed = await self._process.run(parse_packed, content)
        return dataclasses.replace(
            packed.rest,
            prompts=unpack_prompts(packed),
            messages=None if packed.rest.messages is None else await unpack_messages(packed),
            arrival=time.monotonic(),
            trace=trace,
        )

    @unary_boundary
    @_counted
    async def Cancel(self, request: inference_pb2.CancelRequest, context: grpc.aio.ServicerContext) -> inference_pb2.CancelReply:
        found = await self._generator.cancel(request.request_id, "cancelled by request", self._tenant(context))
        return inference_pb2.CancelReply(found=found)

    @unary_boundary
    @_counted
    async def Models(self, request: inference_pb2.ModelsRequest, context: grpc.aio.ServicerContext) -> inference_pb2.ModelsReply:
        self._tenant(context)
        card = self._generator.card
        model = inference_pb2.ModelInfo(
            id=card.name, max_model_len=self._generator.max_model_len, vocab_size=card.vocab_size, dtype=card.dtype
        )
        return inference_pb2.ModelsReply(models=[model])


def parse_packed(content: bytes) -> Packed[GenerateRequest]:
    """As parse_request. Runs in the process."""
    request = parse_request(content)
    rest = dataclasses.replace(request, prompts=(), messages=None if request.messages is None else ())
    return pack(rest, request.prompts, request.messages or ())


def parse_request(content: bytes) -> GenerateRequest:
    """Raises InvalidRequest."""
    try:
        message = inference_pb2.GenerateRequest.FromString(content)
    except DecodeError as error:
        raise InvalidRequest(f"the request is no halfmoon.v1.GenerateRequest: {error}") from error
    if len(message.chat.messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(message.chat.messages)} items; it may have {MAX_MESSAGES}", param="messages")
    return request_from_proto(message)


def request_from_proto(request: inference_pb2.GenerateRequest) -> GenerateRequest:
    """Raises InvalidRequest if there is no input."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("the request has no input; send prompt, tokens or chat", param="prompt")
    sampling: dict[str, Any] = {name: getattr(request, name) for name in _SAMPLING if request.HasField(name)}
    if request.stop_token_ids:
        sampling["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias:
        sampling["logit_bias"] = dict(request.logit_bias)
    if request.HasField("response_format"):
        sampling["grammar"] = Grammar(request.response_format.kind, request.response_format.text)
    prompt_only = request.HasField("num_prompt_logprobs") and request.HasField("max_tokens") and request.max_tokens == 0
    max_tokens = request.max_tokens if request.HasField("max_tokens") else None
    if kind != "chat" and (request.tools or request.parse_reasoning):
        param = "tools" if request.tools else "parse_reasoning"
        raise InvalidRequest(f"{param} belongs to a chat; send messages", param=param)
    tools = _tool_use(request)
    return GenerateRequest(
        prompts={"prompt": [request.prompt], "tokens": [list(request.tokens.token_ids)]}.get(kind, ()),
        messages=[_message(turn) for turn in request.chat.messages] if kind == "chat" else None,
        model=request.model,
        label=request.request_id,
        n=request.n if request.HasField("n") else 1,
        seed=request.seed if request.HasField("seed") else None,
        max_tokens=1 if prompt_only else max_tokens,
        prompt_only=prompt_only,
        stop=list(request.stop),
        timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
        priority=request.priority,
        ttft_slo_s=request.ttft_slo_s if request.HasField("ttft_slo_s") else None,
        tpot_slo_s=request.tpot_slo_s if request.HasField("tpot_slo_s") else None,
        bad_words=list(request.bad_words),
        truncate_prompt_tokens=request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None,
        cache_salt=request.cache_salt,
        text=TextOptions(not request.HasField("skip_special_tokens") or request.skip_special_tokens, request.include_stop_str_in_output),
        add_special_tokens=not request.HasField("add_special_tokens") or request.add_special_tokens,
        chat=_chat_options(request, tools),
        tools=tools if request.tools or request.parse_reasoning else None,
        sampling=sampling,
    )


def _message(turn: inference_pb2.ChatMessage) -> ChatMessage:
    found = {
        "name": turn.name,
        "tool_call_id": turn.tool_call_id,
        "tool_calls": [call_of(call.id or None, call.name, call.arguments) for call in turn.tool_calls],
        "reasoning": turn.reasoning,
        "reasoning_content": turn.reasoning,
    }
    return ChatMessage(turn.role, turn.content, {name: value for name, value in found.items() if value})


def _tool_use(request: inference_pb2.GenerateRequest) -> ToolUse:
    """Raises InvalidRequest."""
    choice = request.tool_choice
    if choice.mode not in ("", "none", "auto", "required"):
        raise InvalidRequest(
            f"tool_choice is {shown(choice.mode)}; it must be none, auto or required, or name a function", param="tool_choice"
        )
    if len(request.tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools has {len(request.tools)} items; it may have {MAX_TOOLS}", param="tools")
    if not request.tools and not choice.function and choice.mode != "required":
        return NO_TOOLS
    functions: list[Function] = []
    definitions: list[dict[str, Any]] = []
    for position, tool in enumerate(request.tools):
        path = f"tools[{position}]"
        parameters = _object(tool.parameters, f"{path}.parameters")
        functions.append(Function.checked(tool.name, parameters, tool.strict, path))
        given = {"description": tool.description, "parameters": parameters, "strict": tool.strict}
        set_ones = {name: value for name, value in given.items() if value}
        definitions.append({"type": "function", "function": {"name": tool.name, **set_ones}})
    parallel = not request.HasField("parallel_tool_calls") or request.parallel_tool_calls
    mode: Any = choice.mode or None
    return ToolUse.of(functions, definitions, mode, choice.function or None, parallel)


def _object(text: str, param: str) -> dict[str, Any]:
    """Of JSON; "": an empty one. Raises InvalidRequest."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param} is not JSON: {error}", param=param) from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"{param} must be a JSON object", param=param)
    return found


def _chat_options(request: inference_pb2.GenerateRequest, tools: ToolUse) -> ChatOptions:
    """Raises InvalidRequest."""
    return ChatOptions.asked(
        _object(request.chat_template_kwargs, "chat_template_kwargs"),
        reasoning_effort=request.reasoning_effort or None,
        add_generation_prompt=request.add_generation_prompt if request.HasField("add_generation_prompt") else None,
        continue_final_message=request.continue_final_message,
        tools=tools.definitions if tools.asks else (),
    )


def _read(parser: AnswerParser, event: GenerationEvent) -> list[inference_pb2.GenerateReply]:
    """The event with its text as what it means, and before a choice's end what was held back."""
    if isinstance(event, TextDelta):
        reply = _delta(dataclasses.replace(event, text=""))
        _add_parts(reply.delta, parser.push(event.text))
        return [reply]
    held = inference_pb2.GenerateReply(delta=inference_pb2.GenerateReply.Delta(index=event.index))
    _add_parts(held.delta, parts := parser.finish())
    return [held, _reply(event)] if parts else [_reply(event)]


def _add_parts(delta: inference_pb2.GenerateReply.Delta, parts: Sequence[Part]) -> None:
    for part in parts:
        if isinstance(part, Content):
            delta.text += part.text
        elif isinstance(part, Reasoning):
            delta.reasoning += part.text
        elif isinstance(part, CallBegin):
            delta.tool_calls.add(number=part.number, id=part.id, name=part.name)
        else:
            assert isinstance(part, CallArguments)
            delta.tool_calls.add(number=part.number, arguments=part.text)


def _reply(event: GenerationEvent) -> inference_pb2.GenerateReply:
    if isinstance(event, TextDelta):
        return _delta(event)
    return inference_pb2.GenerateReply(
        finished=inference_pb2.GenerateReply.Finished(
            index=event.index, reason=event.reason, matched_stop=event.matched_stop or "", phases=event.phases, usage=event.usage
        )
    )


def _delta(event: TextDelta) -> inference_pb2.GenerateReply:
    """Set field by field. Messages made from keywords copy the innermost one twice, which took 10 us a token instead of 4."""
    reply = inference_pb2.GenerateReply()
    delta = reply.delta
    delta.index = event.index
    delta.text = event.text
    if event.outputs:
        delta.tokens.extend(event.outputs)
        delta.token_texts.extend([token.text for token in event.token_texts])
        delta.top_texts.extend([_top_texts(token) for token in event.token_texts])
    else:
        for token_id in event.token_ids:
            delta.tokens.add().token_id = token_id
    return reply


def _prompt(index: int, tokens: Sequence[PromptToken]) -> inference_pb2.GenerateReply:
    reply = inference_pb2.GenerateReply()
    reply.prompt.index = index
    for token in tokens:
        if token.logprob is not None:  # the first has none
            output = reply.prompt.tokens.add(token_id=token.token_id, logprob=token.logprob)
            for top in token.top:
                output.top_logprobs.add(token_id=top.token_id, logprob=top.logprob)
            reply.prompt.token_texts.append(token.text)
            reply.prompt.top_texts.add(texts=[top.text for top in token.top])
    return reply


def _top_texts(token: TokenText) -> inference_pb2.GenerateReply.TopTexts:
    return inference_pb2.GenerateReply.TopTexts(texts=[top.text for top in token.top])
