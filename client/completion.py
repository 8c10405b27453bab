"""What comes back: typed, frozen values of a Completion, and the events that it is made of.

Completion ── Choice (text, token_ids, finish_reason, usage, phases, logprobs)
     ▲
     └── Admitted · Delta, Delta … · Finished    as a stream gives them
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..protocol.v1 import common_pb2, inference_pb2
from .chat import ToolCall, ToolCallDelta, tool_calls_of

FinishReason = Literal["stop", "length"]
_REASONS: dict[int, FinishReason] = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """The life of one choice, in seconds; protocol/v1/common.proto says what each phase spans."""

    queue_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefix_load_s: float = 0.0
    prefill_s: float = 0.0
    push_s: float = 0.0
    handoff_wait_s: float = 0.0
    write_s: float = 0.0
    first_decode_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    prefill_done_s: float = 0.0
    tpot_s: float = 0.0
    e2e_s: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    transport: str = ""
    num_attempts: int = 1
    num_bytes_pushed: int = 0
    num_preemptions: int = 0
    prefill_compute_s: float = 0.0
    predicted_ttft_s: float = 0.0
    predicted_tpot_s: float = 0.0
    placement_reason: str = ""
    ssd_wait_s: float = 0.0

    @classmethod
    def from_proto(cls, message: common_pb2.PhaseRecord) -> PhaseRecord:
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int

    @classmethod
    def from_proto(cls, message: common_pb2.Usage) -> Usage:
        return cls(message.num_prompt_tokens, message.num_completion_tokens, message.num_cached_tokens)


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    text: str
    logprob: float
    top: tuple[TopLogprob, ...]
    """The likeliest tokens, likeliest first: as many as num_logprobs asked for."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request is placed; always the first event."""

    request_id: str
    model: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of a choice's prompt that follow one another, with num_prompt_logprobs: all but the first, before the choice's own."""

    index: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice. text is whole characters, and "" while a character or a stop string is under way."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    """With tools or parse_reasoning: new text of the reasoning."""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of one choice."""

    index: int
    finish_reason: FinishReason
    matched_stop: str | None
    usage: Usage
    phases: PhaseRecord


Event = Admitted | Prompt | Delta | Finished


@dataclass(frozen=True, slots=True)
class Choice:
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: str | None
    usage: Usage
    phases: PhaseRecord
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With num_prompt_logprobs: of all tokens of the prompt but the first."""
    reasoning: str = ""
    """With tools or parse_reasoning."""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's turn, to be sent again."""
        return {"role": "assistant", "content": self.text, "reasoning": self.reasoning, "tool_calls": self.tool_calls}


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer with its n choices. The properties are those of the first choice, the only one unless n was given."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def phases(self) -> PhaseRecord:
        return self.choices[0].phases

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].logprobs

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].prompt_logprobs

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def message(self) -> dict[str, Any]:
        return self.choices[0].message

    @property
    def usage(self) -> Usage:
        """Tokens of all choices together: the prompt counts once, the answers add up."""
        first = self.choices[0].usage
        answered = sum(choice.usage.num_completion_tokens for choice in self.choices)
        return Usage(first.num_prompt_tokens, answered, first.num_cached_tokens)


def event_from_proto(reply: inference_pb2.GenerateReply) -> Event:
    kind = reply.WhichOneof("event")
    if kind == "admitted":
        return Admitted(reply.admitted.request_id, reply.admitted.model, reply.admitted.num_prompt_tokens)
    if kind == "delta":
        return _delta(reply.delta)
    if kind == "prompt":
        return Prompt(reply.prompt.index, _logprobs(reply.prompt))
    message = reply.finished
    return Finished(
        index=message.index,
        finish_reason=_REASONS[message.reason],
        matched_stop=message.matched_stop or None,
        usage=Usage.from_proto(message.usage),
        phases=PhaseRecord.from_proto(message.phases),
    )


def _logprobs(message: inference_pb2.GenerateReply.Delta) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=token.token_id,
            text=text,
            logprob=token.logprob,
            top=tuple(
                TopLogprob(found.token_id, found_text, found.logprob)
                for found, found_text in zip(token.top_logprobs, tops.texts, strict=True)
            ),
        )
        # the texts are there where logprobs were asked for, and only there
        for token, text, tops in zip(message.tokens, message.token_texts, message.top_texts, strict=False)
    )


def _delta(message: inference_pb2.GenerateReply.Delta) -> Delta:
    token_ids = tuple(token.token_id for token in message.tokens)
    calls = tuple(ToolCallDelta(call.number, call.id, call.name, call.arguments) for call in message.tool_calls)
    return Delta(message.index, message.text, token_ids, _logprobs(message), message.reasoning, calls)


class Collector:
    """Events in, a Completion out."""

    def __init__(self) -> None:
        self.admitted: Admitted | None = None
        self._deltas: dict[int, list[Delta]] = {}
        self._finished: dict[int, Finished] = {}
        self._prompts: dict[int, list[Prompt]] = {}

    def add(self, event: Event) -> None:
        if isinstance(event, Admitted):
            self.admitted = event
        elif isinstance(event, Prompt):
            self._prompts.setdefault(event.index, []).append(event)
        elif isinstance(event, Delta):
            self._deltas.setdefault(event.index, []).append(event)
        else:
            self._finished[event.index] = event

    def completion(self) -> Completion:
        """Raises ValueError while a choice is still under way."""
        if self.admitted is None or not self._finished or self._deltas.keys() - self._finished.keys():
            raise ValueError("the stream has not ended; read it to its end first")
        choices = tuple(self._choice(self._finished[index]) for index in sorted(self._finished))
        return Completion(self.admitted.request_id, self.admitted.model, choices)

    def _choice(self, end: Finished) -> Choice:
        deltas = self._deltas.get(end.index, [])
        return Choice(
            index=end.index,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            finish_reason=end.finish_reason,
            matched_stop=end.matched_stop,
            usage=end.usage,
            phases=end.phases,
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
            prompt_logprobs=tuple(logprob for part in self._prompts.get(end.index, []) for logprob in part.logprobs),
            reasoning="".join(delta.reasoning for delta in deltas),
            tool_calls=tool_calls_of(call for delta in deltas for call in delta.tool_calls),
        )
