"""The path from a user's request to the text that streams back. Both faces, HTTP and gRPC, use it.

GenerateRequest ─► RequestBuilder ─► ProxyRequest per choice ─► Router.open_all ─► TokenStream
                                                                                        │ tokens
Generation ◄─ TextDelta …, ChoiceEnd ◄─ ChoiceText (detokenise, stop strings, logprobs) ◄─┘
The tokens of one step wake the reader once, whatever the number of choices.
Leaving a Generation in any way cancels all of its choices.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from ...protocol.errors import HalfmoonError
from ...protocol.log_context import logged
from ...protocol.schema import KVSchema
from ...protocol.v1 import common_pb2
from ...protocol.version import package_version
from ..model_card import ModelCard
from ..request import Finished, RequestState, TokenEvent, Tokens
from ..tenants.tenant import Tenant
from ..text.answer_form import AnswerForm, AnswerForms
from ..text.tokenizer import Tokenizer
from ..tracing import trace_of
from .choice_text import ChoiceText, TokenText
from .generate_request import GenerateRequest, RequestBuilder
from .prompt_text import PromptText
from .router import Router
from .token_stream import LEFT, TokenStream

MAX_BEHIND = 32  # steps; a reader further behind gets all their tokens as one event
_ENDS = (RequestState.DONE, RequestState.REJECTED, RequestState.ABORTED, RequestState.FAILED)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """text: whole characters that can no longer change. It may be "" while a character or a stop string is incomplete."""

    index: int
    text: str
    token_ids: list[int]
    outputs: list[common_pb2.TokenOutput]  # one for each token if logprobs were asked for, else none; so are token_texts
    token_texts: list[TokenText]


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    index: int
    reason: common_pb2.FinishReason
    matched_stop: str | None
    stop_reason: str | int | None  # the request's own stop string or token; None: EOS, or the length
    phases: common_pb2.PhaseRecord
    usage: common_pb2.Usage


GenerationEvent = TextDelta | ChoiceEnd


class _Inbox:
    """Which choices have news. Runners hold the inbox, and the inbox holds no stream. One reader waits; a future costs half of an Event."""

    def __init__(self) -> None:
        self._ready: dict[int, None] = {}
        self._waiting: asyncio.Future[None] | None = None

    def put(self, index: int) -> None:
        self._ready[index] = None
        waiting = self._waiting
        if waiting is not None:
            self._waiting = None
            if not waiting.done():
                waiting.set_result(None)

    def take(self) -> dict[int, None]:
        ready, self._ready = self._ready, {}
        return ready

    async def wait(self) -> None:
        """Until something is ready, which may be so at once."""
        if not self._ready:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting


class Generation:
    """One admitted GenerateRequest: the events of all choices as they come. The last event of a choice is its ChoiceEnd."""

    def __init__(self, request_id: str, model: str, num_prompt_tokens: int, choices: list[_Choice], tenant: Tenant | None = None) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.model = model
        self.created = int(time.time())
        self.num_prompt_tokens = num_prompt_tokens  # of all prompts together
        self.num_choices = len(choices)
        self.prompts: Sequence[Sequence[int]] = ()  # token ids of each, where the client wants them back
        self.is_scored = False  # the log probabilities of its prompts were asked for
        self.fingerprint = ""
        self.form: AnswerForm | None = None  # how the answers are read; None: they are plain text
        self._choices = choices
        self._num_open = len(choices)
        self._inbox = _Inbox()
        self._given: deque[GenerationEvent] = deque()  # for the iterator
        self._error: HalfmoonError | None = None
        self._unwritten: list[TokenStream] = []  # of choices whose events were given last
        for choice in choices:
            choice.listen(self._inbox)

    def prompt_text(self, index: int) -> PromptText:
        """Of a choice's prompt, scored; from its first event on, where its log probabilities were asked for."""
        return self._choices[index].prompt_text()

    async def next_events(self) -> list[GenerationEvent]:
        """At least one event, or none at the end. If the caller is cancelled, all choices are cancelled.

        Who asks for more has written what it was given: the times of those tokens are taken here.

        If a choice failed, raises its HalfmoonError after all events before it, and cancels the other choices.
        """
        for stream in self._unwritten:
            stream.wrote()
        self._unwritten.clear()
        while True:
            if events := self._take():
                return events
            if self._error is not None:
                raise self._error
            if self._num_open == 0:
                return []
            try:
                await self._inbox.wait()
            except asyncio.CancelledError:
                self._cancel(LEFT)
                raise

    def _take(self) -> list[GenerationEvent]:
        events: list[GenerationEvent] = []
        if self._error is not None:
            return events
        for index in self._inbox.take():
            choice = self._choices[index]
            try:
                found = choice.take()
            except HalfmoonError as error:
                self._error = error
                self._cancel(LEFT)
                return events
            events += found
            self._unwritten.append(choice.stream)
            if found and isinstance(found[-1], ChoiceEnd):
                self._num_open -= 1
            elif choice.is_over:
                self._inbox.put(index)  # its error comes after these
        return events

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> GenerationEvent:
        """Raises as next_events does."""
        if not self._given:
            self._given.extend(await self.next_events())
        if not self._given:
            raise StopAsyncIteration
        return self._given.popleft()

    @property
    def is_over(self) -> bool:
        return all(choice.is_over for choice in self._choices)

    def cancel(self, reason: str) -> None:
        """The reader of the events gets RequestCancelled with the reason."""
        self._cancel(reason)

    def _cancel(self, reason: str) -> None:
        for choice in self._choices:
            choice.stream.abandon(reason)

    async def aclose(self) -> None:
        self._cancel(LEFT)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Generator:
    """Opens Generations and knows those that are under way. All choices of a GenerateRequest are admitted, or none is."""

    def __init__(
        self, router: Router, tokenizer: Tokenizer, card: ModelCard, default_timeout_s: float, forms: AnswerForms | None = None
    ) -> None:
        """forms: None: answers are plain text."""
        self.router = router
        self.card = card
        self.tokenizer = tokenizer
        self._builder = RequestBuilder(tokenizer, card, default_timeout_s, forms)
        self._under_way: weakref.WeakValueDictionary[str, Generation] = weakref.WeakValueDictionary()

    @property
    def max_model_len(self) -> int:
        """What the workers can hold. Before any has joined: what the model was made for."""
        return self.router.max_model_len or self.card.max_model_len

    @property
    def takes_chats(self) -> bool:
        """The model has a chat template."""
        return self.tokenizer.chat_template is not None

    async def decode_aside(self, prompts: Sequence[str | list[int]]) -> list[str]:
        """The texts of prompts."""
        return [prompt if isinstance(prompt, str) else await self.tokenizer.decode_aside(prompt) for prompt in prompts]

    async def tokenize(self, request: GenerateRequest) -> Sequence[int]:
        """The tokens of its one prompt, however many the model takes. Raises InvalidRequest."""
        return await self._builder.tokenize(request, self.max_model_len)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Special tokens have their text. Raises InvalidRequest."""
        await self._builder.require_tokens(model, token_ids)
        return await self.tokenizer.decode_aside(token_ids, skip_special_tokens=False)

    async def open(self, request: GenerateRequest) -> Generation:
        """Raises InvalidRequest, or what Router.open raises. Nothing is left running then."""
        trace = trace_of(request.trace, self.router.tracer)
        with logged(request.request_id, trace):  # what is spawned inside keeps it
            return await self._open(dataclasses.replace(request, trace=trace))

    async def _open(self, request: GenerateRequest) -> Generation:
        requests, tenant = await self._builder.build(request, self.max_model_len), request.tenant
        num_prompt_tokens = sum(len(choice.token_ids) for choice in requests[:: request.n])
        form = self._builder.form(request, requests[0].token_ids)
        text = request.text if form is None else request.text._replace(shown=form.shown)
        if tenant is not None:
            tenant.admit(num_prompt_tokens)
        streams = await self.router.open_all(requests)
        choices = [
            _Choice(
                index,
                stream,
                ChoiceText(self.tokenizer, choice, tuple(request.stop), self.card.eos_token_ids, text),
                tenant,
                request.sampling.get("stop_token_ids", ()),
                partial(PromptText, self.tokenizer, choice.token_ids),
                prompt_only=request.prompt_only,
            )
            for index, (choice, stream) in enumerate(zip(requests, streams, strict=True))
        ]
        generation = Generation(request.request_id, self.card.name, num_prompt_tokens, choices, tenant)
        generation.fingerprint = _fingerprint(self.router.schema)
        generation.is_scored = "num_prompt_logprobs" in request.sampling
        generation.form = form
        if request.return_token_ids:
            generation.prompts = [choice.token_ids for choice in requests[:: request.n]]
        self._under_way[request.request_id] = generation
        return generation

    async def cancel(self, request_id: str, reason: str, tenant: Tenant | None = None) -> bool:
        """True if such a request of the tenant was under way."""
        generation = self._under_way.get(request_id)
        if generation is None or generation.is_over or generation.tenant is not tenant:
            return False
        del self._under_way[request_id]
        generation.cancel(reason)
        return True


@functools.lru_cache(maxsize=8)
def _fingerprint(schema: KVSchema | None) -> str:
    """OpenAI's name for what an answer is made by: another one after another model, KV format or version of Halfmoon."""
    made_by = package_version().encode() + (schema.fingerprint if schema is not None else b"")
    return f"fp_{hashlib.blake2b(made_by, digest_size=5).hexdigest()}"


class _Choice:
    def __init__(
        self,
        index: int,
        stream: TokenStream,
        text: ChoiceText,
        tenant: Tenant | None,
        own_stops: Collection[int],
        prompt_text: Callable[[Sequence[common_pb2.PromptLogprobs]], PromptText],
        *,
        prompt_only: bool,
    ) -> None:
        self._prompt_only = prompt_only
        self._prompt_text = prompt_text
        self._own_stops = own_stops
        self._tenant = tenant
        self.index = index
        self.stream = stream
        self._text = text

    @property
    def is_over(self) -> bool:
        return self.stream.state in _ENDS

    def prompt_text(self) -> PromptText:
        return self._prompt_text(self.stream.prompt_logprobs)

    def listen(self, inbox: _Inbox) -> None:
        self.stream.listen(partial(inbox.put, self.index))
        inbox.put(self.index)  # something may have come already

    def take(self) -> list[GenerationEvent]:
        """The events since the last call. Raises the HalfmoonError that ended the choice."""
        events: list[GenerationEvent] = []
        arrived = self.stream.take()
        for event in arrived if len(arrived) <= MAX_BEHIND else _together(arrived):
            if isinstance(event, Tokens):
                if self._text.matched_stop is None and not self._prompt_only:
                    events.append(self._delta(event))
                continue
            if self._text.matched_stop is None and (tail := self._text.finish()):
                events.append(TextDelta(self.index, tail, [], [], []))
            events.append(self._end(event))
        return events

    def _delta(self, event: Tokens) -> TextDelta:
        if self._tenant is not None:
            self._tenant.spend(len(event.token_ids))
        delta = TextDelta(self.index, *self._text.push(event.token_ids, event.outputs))
        if self._text.matched_stop is not None:
            self.stream.stop_soon(self._text.num_tokens)
        return delta

    def _end(self, finished: Finished) -> ChoiceEnd:
        usage = common_pb2.Usage(
            num_prompt_tokens=finished.usage.num_prompt_tokens,
            num_completion_tokens=self._text.num_tokens,  # up to a stop string, not what came after it
            num_cached_tokens=finished.usage.num_cached_tokens,
        )
        reason = finished.reason if self._text.matched_stop is None else common_pb2.FINISH_REASON_STOP
        if self._prompt_only:
            reason = common_pb2.FINISH_REASON_LENGTH  # whatever the one token is that nobody asked for
        stop_reason = self._text.stop_reason(self._own_stops) if reason == common_pb2.FINISH_REASON_STOP else None
        matched_stop = stop_reason if isinstance(stop_reason, str) else None
        return ChoiceEnd(self.index, reason, matched_stop, stop_reason, finished.phases, usage)


def _together(events: list[TokenEvent]) -> list[TokenEvent]:
    """The same with all tokens in one event, for a reader that is far behind."""
    token_ids: list[int] = []
    outputs: list[common_pb2.TokenOutput] = []
    rest: list[TokenEvent] = []
    for event in events:
        if isinstance(event, Tokens):
            token_ids += event.token_ids
            outputs += event.outputs
        else:
            rest.append(event)
    return [Tokens(token_ids, outputs), *rest]
