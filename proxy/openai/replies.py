"""Generations in OpenAI's two shapes, whole or in chunks. Plain dictionaries, because our own values need no checking.

shape          whole reply (object)     chunk (object)             a choice's text     logprobs
CompletionShape  text_completion        text_completion            text                tokens, token_logprobs …
ChatShape        chat.completion        chat.completion.chunk      message | delta     content: [{token, bytes …}]
                                                                   of parts, where a parser reads them (tool_replies.py)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...client.completion import PhaseRecord
from ...protocol.v1 import common_pb2
from ..requests.choice_text import TokenText
from ..requests.generation import ChoiceEnd, Generation
from ..text.answer_parts import Part
from .encoded import spliced, to_json
from .prompt_scores import LEAST_LOGPROB, UNSCORED, PromptForms, legacy_part, listed_part, prompt_json
from .tool_replies import delta, message

_REASONS = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(slots=True)
class WholeChoice:
    index: int
    texts: list[str] = field(default_factory=list[str])
    token_texts: list[TokenText] = field(default_factory=list[TokenText])
    token_ids: list[int] = field(default_factory=list[int])
    parts: list[Part] = field(default_factory=list[Part])  # of the same texts, where a parser reads them
    end: ChoiceEnd | None = None


class Shape:
    """echoes: the prompts, if each is to be repeated before its answers. forms: of the prompts' log probabilities."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self, generation: Generation, *, n: int, wants_logprobs: bool, echoes: Sequence[str] = (), forms: PromptForms = UNSCORED
    ) -> None:
        self.forms = forms
        self._generation = generation
        self._n = n
        self.wants_logprobs = wants_logprobs
        self.echoes = echoes
        self.wants_token_ids = bool(generation.prompts)

    def whole(self, choices: Sequence[WholeChoice]) -> dict[str, Any]:
        ends = [choice.end for choice in choices if choice.end is not None]
        reply = self._envelope(self.whole_object, [self._whole_choice(choice) for choice in choices])
        return reply | {"usage": self.usage(ends), "halfmoon": self._extension(ends)}

    @property
    def reads(self) -> bool:
        """Answers are read by a parser: their texts are given to parts(), and what that returns is given on."""
        return False

    def parts(self, index: int, text: str | None) -> list[Part]:
        """What the next text of a choice consists of; text None: what was held back, at its end."""
        return []

    def part_chunk(self, index: int, part: Part | None, token_texts: Sequence[TokenText], token_ids: Sequence[int]) -> dict[str, Any]:
        """part None: tokens whose text is held back."""
        raise NotImplementedError

    async def whole_json(self, choices: Sequence[WholeChoice]) -> list[bytes]:
        """As whole, encoded, in parts."""
        reply = self.whole(choices)
        return await self._scored_json(reply) if self.forms.any else [to_json(reply).encode()]

    def openings(self, index: int) -> AsyncIterator[dict[str, Any]]:
        """The chunks before a choice's first text."""
        raise NotImplementedError

    async def _scored_json(self, reply: dict[str, Any]) -> list[bytes]:
        """With the prompts' log probabilities, which are encoded in parts."""
        raise NotImplementedError

    def chunk(self, index: int, text: str, token_texts: Sequence[TokenText], token_ids: Sequence[int] = ()) -> dict[str, Any]:
        choice = self._chunk_choice(index, text, token_texts, None)
        if self.wants_token_ids:
            choice["token_ids"] = list(token_ids)
        return self._envelope(self.chunk_object, [choice])

    def last_chunk(self, end: ChoiceEnd) -> dict[str, Any]:
        choice = self._chunk_choice(end.index, None, [], self._reason(end)) | {"stop_reason": end.stop_reason}
        return self._envelope(self.chunk_object, [choice]) | {"halfmoon": self._extension([end])}

    def usage_chunk(self, ends: Sequence[ChoiceEnd]) -> dict[str, Any]:
        return self._envelope(self.chunk_object, []) | {"usage": self.usage(ends)}

    def usage(self, ends: Sequence[ChoiceEnd]) -> dict[str, Any]:
        """A prompt counts once for all its choices. Its cached tokens are those of the first choice."""
        num_prompt_tokens = self._generation.num_prompt_tokens
        num_completion_tokens = sum(end.usage.num_completion_tokens for end in ends)
        cached = sum(end.usage.num_cached_tokens for end in ends if end.index % self._n == 0)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def running_usage(self, index: int, num_completion_tokens: int) -> dict[str, int]:
        """Of one choice that goes on, and of all prompts."""
        num_prompt_tokens = self._generation.num_prompt_tokens
        total = num_prompt_tokens + num_completion_tokens
        return {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_completion_tokens, "total_tokens": total}

    def _reason(self, end: ChoiceEnd) -> str:
        return _REASONS[end.reason]

    def _ended(self, choice: WholeChoice) -> dict[str, Any]:
        """What a whole choice has beside OpenAI's fields."""
        assert choice.end is not None
        tokens = {"token_ids": choice.token_ids} if self.wants_token_ids else {}
        return {"stop_reason": choice.end.stop_reason, **tokens}

    def _whole_choice(self, choice: WholeChoice) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk_choice(self, index: int, text: str | None, token_texts: Sequence[TokenText], reason: str | None) -> dict[str, Any]:
        """text None: the chunk that only carries the finish reason."""
        raise NotImplementedError

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        generation = self._generation
        head = {"id": f"{self.id_prefix}-{generation.request_id}", "object": kind, "created": generation.created}
        return head | {"model": generation.model, "system_fingerprint": generation.fingerprint, "choices": choices}

    def _extension(self, ends: Sequence[ChoiceEnd]) -> dict[str, Any]:
        phases = [{"index": end.index, **PhaseRecord.from_proto(end.phases).as_dict()} for end in ends]
        return {"request_id": self._generation.request_id, "phases": phases}


class CompletionShape(Shape):
    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    async def openings(self, index: int) -> AsyncIterator[dict[str, Any]]:
        echo, prompt = self._echo(index), self._prompt(index)
        if not self.forms.any:
            if self.echoes or prompt:
                yield self._opening(index, echo, prompt)
            return
        forms, text, begin, num_given = self.forms, self._generation.prompt_text(index), 0, 0
        async for part in text.parts():
            num_given += len(part)
            end = len(echo) if num_given == text.num_tokens else min(part[-1].text_end, len(echo))
            legacy = {} if forms.echoed is None else {"logprobs": legacy_part(part, forms.echoed, len(echo))}
            listed = {} if forms.listed is None else {"prompt_logprobs": listed_part(part, forms.listed)}
            yield self._opening(index, echo[begin:end], {**legacy, **listed, **prompt})
            begin, prompt = end, {}

    def _opening(self, index: int, text: str, fields: dict[str, Any]) -> dict[str, Any]:
        opening = self.chunk(index, text, [])
        opening["choices"][0] |= fields
        return opening

    async def _scored_json(self, reply: dict[str, Any]) -> list[bytes]:
        choices: list[bytes] = []
        for choice in reply["choices"]:
            index = choice["index"]
            found = await prompt_json(self._generation.prompt_text(index), self.forms, len(self._echo(index)), choice["logprobs"])
            choices += [b"," if choices else b"[", *spliced(choice | dict.fromkeys(found), found)]
        return spliced(reply | {"choices": None}, {"choices": [*choices, b"]"]})

    def _echo(self, index: int) -> str:
        return self.echoes[index // self._n] if self.echoes else ""

    def _whole_choice(self, choice: WholeChoice) -> dict[str, Any]:
        assert choice.end is not None
        reason = _REASONS[choice.end.reason]
        whole = self._chunk_choice(choice.index, self._echo(choice.index) + "".join(choice.texts), choice.token_texts, reason)
        return whole | self._ended(choice) | self._prompt(choice.index)

    def _prompt(self, index: int) -> dict[str, Any]:
        return {"prompt_token_ids": list(self._generation.prompts[index // self._n])} if self.wants_token_ids else {}

    def _chunk_choice(self, index: int, text: str | None, token_texts: Sequence[TokenText], reason: str | None) -> dict[str, Any]:
        echo_len = len(self._echo(index))
        logprobs = _legacy_logprobs(token_texts, echo_len) if self.wants_logprobs and text is not None else None
        return {"index": index, "text": text or "", "logprobs": logprobs, "finish_reason": reason}


class ChatShape(Shape):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, generation: Generation, *, n: int, wants_logprobs: bool, forms: PromptForms = UNSCORED) -> None:
        super().__init__(generation, n=n, wants_logprobs=wants_logprobs, forms=forms)
        form = generation.form
        self._parsers = [] if form is None else [form.parser() for _ in range(generation.num_choices)]

    @property
    def reads(self) -> bool:
        return bool(self._parsers)

    def parts(self, index: int, text: str | None) -> list[Part]:
        if not self._parsers:
            return []
        return self._parsers[index].finish() if text is None else self._parsers[index].push(text)

    def part_chunk(self, index: int, part: Part | None, token_texts: Sequence[TokenText], token_ids: Sequence[int]) -> dict[str, Any]:
        choice = {"index": index, "delta": {} if part is None else delta(part), "logprobs": self._logprobs(token_texts)}
        tokens = {"token_ids": list(token_ids)} if self.wants_token_ids else {}
        return self._envelope(self.chunk_object, [{**choice, "finish_reason": None, **tokens}])

    def _reason(self, end: ChoiceEnd) -> str:
        reason = super()._reason(end)
        return "tool_calls" if reason == "stop" and self._parsers and self._parsers[end.index].has_calls else reason

    async def openings(self, index: int) -> AsyncIterator[dict[str, Any]]:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield self._envelope(self.chunk_object, [choice]) | self._prompt()
        if self.forms.listed is not None and index == 0:
            async for part in self._generation.prompt_text(index).parts():
                yield self.chunk(index, "", []) | {"prompt_logprobs": listed_part(part, self.forms.listed)}

    async def _scored_json(self, reply: dict[str, Any]) -> list[bytes]:
        found = await prompt_json(self._generation.prompt_text(0), self.forms, 0, None)
        return spliced(reply | dict.fromkeys(found), found)

    def whole(self, choices: Sequence[WholeChoice]) -> dict[str, Any]:
        return super().whole(choices) | self._prompt()

    def _prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self._generation.prompts[0])} if self.wants_token_ids else {}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return super()._envelope(kind, choices) | {"service_tier": "default"}

    def _whole_choice(self, choice: WholeChoice) -> dict[str, Any]:
        assert choice.end is not None
        said = message(choice.parts) if self.reads else {"content": "".join(choice.texts)}
        logprobs = self._logprobs(choice.token_texts)
        whole = {"index": choice.index, "message": {"role": "assistant", **said, "refusal": None}, "logprobs": logprobs}
        whole |= {"finish_reason": self._reason(choice.end)}
        return whole | self._ended(choice)

    def _chunk_choice(self, index: int, text: str | None, token_texts: Sequence[TokenText], reason: str | None) -> dict[str, Any]:
        said: Mapping[str, Any] = {} if text is None else {"content": text}
        logprobs = None if text is None else self._logprobs(token_texts)
        return {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, token_texts: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        return {"content": [spelled(token) for token in token_texts], "refusal": None}


def spelled(token: TokenText) -> dict[str, Any]:
    """A token with its log probability, and the likeliest ones."""
    tops = [_spelled(top.text, top.raw, top.logprob) for top in token.top]
    return _spelled(token.text, token.raw, token.logprob) | {"top_logprobs": tops}


def _spelled(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}


def _legacy_logprobs(token_texts: Sequence[TokenText], first_offset: int) -> dict[str, Any]:
    tops: list[dict[str, float]] = []
    for token in token_texts:
        top: dict[str, float] = {}
        for found in token.top:
            top.setdefault(found.text, max(found.logprob, LEAST_LOGPROB))  # several tokens may look alike ("�"); the likeliest one stays
        top.setdefault(token.text, max(token.logprob, LEAST_LOGPROB))  # the sampled token is always included, as in OpenAI's API
        tops.append(top)
    return {
        "tokens": [token.text for token in token_texts],
        "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in token_texts],
        "top_logprobs": tops,
        "text_offset": [first_offset + token.text_offset for token in token_texts],
    }
