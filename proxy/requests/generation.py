"""The one path from what a user asked to text that streams back. Both faces, HTTP and gRPC, use it.

GenerateRequest ─► RequestBuilder ─► ProxyRequest per choice ─► Router.open_all ─► TokenStream
                                                               │ tokens
Generation ◄─ TextDelta …, ChoiceEnd ◄─ ChoiceText (detokenise, stop strings, logprobs) ◄─┘
Leaving a Generation in any way cancels all its choices.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ...protocol.errors import InvalidRequest
from ...protocol.v1 import common_pb2
from ..model_card import ModelCard
from ..request import Finished, RequestState
from ..text.tokenizer import Tokenizer
from .choice_text import ChoiceText, TokenText
from .generate_request import GenerateRequest, RequestBuilder
from .router import Router
from .token_stream import TokenStream

LEFT = "the client left the stream"
_ENDS = (RequestState.DONE, RequestState.REJECTED, RequestState.ABORTED, RequestState.FAILED)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """text: whole characters that can no longer change; may be "" while a character or a stop string is under way."""

    index: int
    text: str
    tokens: list[common_pb2.TokenOutput]
    token_texts: list[TokenText]  # per token where logprobs were asked for, else empty


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    index: int
    reason: common_pb2.FinishReason
    matched_stop: str | None
    phases: common_pb2.PhaseRecord
    usage: common_pb2.Usage


GenerationEvent = TextDelta | ChoiceEnd


class Generation:
    """One admitted GenerateRequest: an async iterator over the events of all choices, as they come. A choice's last is its ChoiceEnd."""

    def __init__(self, request_id: str, model: str, num_prompt_tokens: int, choices: list[_Choice]) -> None:
        self.request_id = request_id
        self.model = model
        self.created = int(time.time())
        self.num_prompt_tokens = num_prompt_tokens  # of all prompts together
        self.num_choices = len(choices)
        self._choices = choices
        self._events = _merged(choices)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> GenerationEvent:
        """Raises the HalfmoonError that ended one of the choices; the others are cancelled."""
        return await anext(self._events)

    @property
    def is_over(self) -> bool:
        return all(choice.is_over for choice in self._choices)

    async def cancel(self, reason: str) -> None:
        """Whoever reads the events gets RequestCancelled with the reason."""
        for choice in self._choices:
            await choice.stream.cancel(reason)

    async def aclose(self) -> None:
        await self.cancel(LEFT)
        await self._events.aclose()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Generator:
    """Opens Generations, and knows those that are under way. The choices of an GenerateRequest are admitted together or not at all."""

    def __init__(self, router: Router, tokenizer: Tokenizer, card: ModelCard, default_timeout_s: float) -> None:
        self.router = router
        self.card = card
        self._tokenizer = tokenizer
        self._builder = RequestBuilder(tokenizer, card, default_timeout_s)
        self._under_way: weakref.WeakValueDictionary[str, Generation] = weakref.WeakValueDictionary()

    @property
    def max_model_len(self) -> int:
        """What the workers can hold; before any joined, what the model was made for."""
        return self.router.max_model_len or self.card.max_model_len

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids)

    async def open(self, asked: GenerateRequest) -> Generation:
        """Raises InvalidRequest, or what Router.open raises; nothing is left running then."""
        requests = await self._builder.build(asked, self.max_model_len)
        if (other := self._under_way.get(asked.request_id)) is not None and not other.is_over:
            raise InvalidRequest(f"request id {asked.request_id!r} is under way already; choose another", param="request_id")
        streams = await self.router.open_all(requests)
        choices = [
            _Choice(index, stream, ChoiceText(self._tokenizer, request, tuple(asked.stop), self.card.eos_token_ids))
            for index, (request, stream) in enumerate(zip(requests, streams, strict=True))
        ]
        num_prompt_tokens = sum(len(request.token_ids) for request in requests[:: asked.n])
        generation = Generation(asked.request_id, self.card.name, num_prompt_tokens, choices)
        self._under_way[asked.request_id] = generation
        return generation

    async def cancel(self, request_id: str, reason: str) -> bool:
        """Whether there was such a request under way."""
        generation = self._under_way.pop(request_id, None)
        if generation is None or generation.is_over:
            return False
        await generation.cancel(reason)
        return True


class _Choice:
    def __init__(self, index: int, stream: TokenStream, text: ChoiceText) -> None:
        self.index = index
        self.stream = stream
        self._text = text

    @property
    def is_over(self) -> bool:
        return self.stream.state in _ENDS

    async def events(self) -> AsyncGenerator[GenerationEvent, None]:
        text = self._text
        async for event in self.stream:
            if isinstance(event, Finished):
                if tail := text.finish():
                    yield TextDelta(self.index, tail, [], [])
                yield self._end(event)
                return
            yield TextDelta(self.index, *text.push(event.tokens))
            if text.matched_stop is not None:
                yield self._end(await self.stream.stop())
                return

    def _end(self, finished: Finished) -> ChoiceEnd:
        usage = common_pb2.Usage(
            num_prompt_tokens=finished.usage.num_prompt_tokens,
            num_completion_tokens=self._text.num_tokens,  # those up to a stop string, not those that came in its wake
            num_cached_tokens=finished.usage.num_cached_tokens,
        )
        reason = finished.reason if self._text.matched_stop is None else common_pb2.FINISH_REASON_STOP
        return ChoiceEnd(self.index, reason, self._text.matched_stop, finished.phases, usage)


async def _merged(choices: list[_Choice]) -> AsyncGenerator[GenerationEvent, None]:
    """The events of all choices, each as soon as it is there."""
    sources = [choice.events() for choice in choices]
    try:
        async with contextlib.aclosing(_interleaved(sources) if len(sources) > 1 else sources[0]) as events:
            async for event in events:
                yield event
    finally:
        for choice in choices:
            await choice.stream.cancel(LEFT)  # without effect on those that came to their end


async def _interleaved(sources: list[AsyncGenerator[GenerationEvent, None]]) -> AsyncGenerator[GenerationEvent, None]:
    waiting = {asyncio.ensure_future(anext(source, None)): source for source in sources}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = waiting.pop(task)
                event = task.result()
                if event is not None:
                    waiting[asyncio.ensure_future(anext(source, None))] = source
                    yield event
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()
