"""halfmoon.v1.Inference: the gRPC face, what the SDK speaks to.

Generate ─► GenerateRequest ─► Generation ─► Admitted, Delta …, Finished a choice      the stream's end cancels what is left
"""

from __future__ import annotations

import uuid
from typing import Any

import grpc.aio

from ..protocol.errors import InvalidRequest
from ..protocol.grpc_errors import unary_boundary
from ..protocol.v1 import inference_pb2, inference_pb2_grpc
from .requests.choice_text import TokenText
from .requests.generate_request import GenerateRequest
from .requests.generation import GenerationEvent, Generator, TextDelta
from .text.chat_template import ChatMessage

_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "ignore_eos", "num_logprobs"),
)


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    # a coroutine that writes, not a generator: what it holds is let go at the stream's end and not at the collector's leisure
    @unary_boundary
    async def Generate(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with await self._generator.open(ask_from_proto(request)) as generation:
            admitted = inference_pb2.GenerateReply.Admitted(
                request_id=generation.request_id, model=generation.model, num_prompt_tokens=generation.num_prompt_tokens
            )
            await context.write(inference_pb2.GenerateReply(admitted=admitted))
            async for event in generation:
                await context.write(_reply(event))

    @unary_boundary
    async def Cancel(self, request: inference_pb2.CancelRequest, context: grpc.aio.ServicerContext) -> inference_pb2.CancelReply:
        return inference_pb2.CancelReply(found=await self._generator.cancel(request.request_id, "cancelled by request"))

    @unary_boundary
    async def Models(self, request: inference_pb2.ModelsRequest, context: grpc.aio.ServicerContext) -> inference_pb2.ModelsReply:
        card = self._generator.card
        model = inference_pb2.ModelInfo(
            id=card.name, max_model_len=self._generator.max_model_len, vocab_size=card.vocab_size, dtype=card.dtype
        )
        return inference_pb2.ModelsReply(models=[model])


def ask_from_proto(request: inference_pb2.GenerateRequest) -> GenerateRequest:
    """Raises InvalidRequest where there is no input."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("the request has no input; send prompt, tokens or chat", param="prompt")
    sampling: dict[str, Any] = {name: getattr(request, name) for name in _SAMPLING if request.HasField(name)}
    if request.stop_token_ids:
        sampling["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias:
        sampling["logit_bias"] = dict(request.logit_bias)
    return GenerateRequest(
        prompts={"prompt": [request.prompt], "tokens": [list(request.tokens.token_ids)]}.get(kind, ()),
        messages=[ChatMessage(turn.role, turn.content) for turn in request.chat.messages] if kind == "chat" else None,
        model=request.model,
        request_id=request.request_id or uuid.uuid4().hex,
        n=request.n if request.HasField("n") else 1,
        seed=request.seed if request.HasField("seed") else None,
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        stop=list(request.stop),
        timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
        priority=request.priority,
        ttft_slo_s=request.ttft_slo_s if request.HasField("ttft_slo_s") else None,
        tpot_slo_s=request.tpot_slo_s if request.HasField("tpot_slo_s") else None,
        sampling=sampling,
    )


def _reply(event: GenerationEvent) -> inference_pb2.GenerateReply:
    if isinstance(event, TextDelta):
        return inference_pb2.GenerateReply(
            delta=inference_pb2.GenerateReply.Delta(
                index=event.index,
                text=event.text,
                tokens=event.tokens,
                token_texts=[token.text for token in event.token_texts],
                top_texts=[_top_texts(token) for token in event.token_texts],
            )
        )
    return inference_pb2.GenerateReply(
        finished=inference_pb2.GenerateReply.Finished(
            index=event.index, reason=event.reason, matched_stop=event.matched_stop or "", phases=event.phases, usage=event.usage
        )
    )


def _top_texts(token: TokenText) -> inference_pb2.GenerateReply.TopTexts:
    return inference_pb2.GenerateReply.TopTexts(texts=[top.text for top in token.top])
