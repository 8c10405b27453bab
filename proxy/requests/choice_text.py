"""The text of one choice: what each token adds, where the text ends, how likely each token was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...protocol.v1 import common_pb2
from ..request import ProxyRequest
from ..text.detokenizer import StopStrings, create_detokenizer
from ..text.tokenizer import Tokenizer


class TopText(NamedTuple):
    text: str
    raw: bytes
    logprob: float


class TokenText(NamedTuple):
    text: str  # of the token by itself; "�" for part of a character
    raw: bytes
    logprob: float
    text_offset: int  # in the choice's text, where the token begins
    top: list[TopText]  # likeliest first


class Pushed(NamedTuple):
    text: str
    token_ids: list[int]
    outputs: list[common_pb2.TokenOutput]  # one for each token if logprobs were asked for, else none; so are token_texts
    token_texts: list[TokenText]


class ChoiceText:
    def __init__(self, tokenizer: Tokenizer, request: ProxyRequest, stop: Sequence[str], eos_token_ids: frozenset[int]) -> None:
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._params = request.sampling
        self._detokenizer = create_detokenizer(tokenizer, request.token_ids)
        self._stops = StopStrings(stop)
        # tokens that end the answer are not part of its text
        self._silent = frozenset(self._params.stop_token_ids) | (frozenset[int]() if self._params.ignore_eos else eos_token_ids)
        self._text_len = 0  # of everything decoded, held back or not

    @property
    def matched_stop(self) -> str | None:
        return self._stops.matched

    def push(self, token_ids: list[int], outputs: list[common_pb2.TokenOutput]) -> Pushed:
        """Leaves out tokens after a stop string. outputs: of the same tokens, if logprobs were asked for."""
        if len(token_ids) == 1 and not outputs:
            self.num_tokens += 1
            return Pushed(self._text_of(token_ids[0]), token_ids, outputs, [])
        out: list[str] = []
        texts: list[TokenText] = []
        for position, token_id in enumerate(token_ids):
            self.num_tokens += 1
            if outputs:
                texts.append(self._token_text(outputs[position]))
            out.append(self._text_of(token_id))
            if self._stops.matched is not None:
                token_ids, outputs = token_ids[: position + 1], outputs[: position + 1]
                break
        return Pushed("".join(out), token_ids, outputs, texts)

    def finish(self) -> str:
        """The text that was held back: an incomplete character, or the beginning of a stop string that did not come."""
        tail = self._stops.push(self._detokenizer.finish())
        return tail if self._stops.matched is not None else tail + self._stops.finish()

    def _text_of(self, token_id: int) -> str:
        if token_id in self._silent and self.num_tokens >= self._params.min_tokens:
            return ""
        text = self._detokenizer.push(token_id)
        self._text_len += len(text)
        # as in vLLM, a stop string must end after the min_tokens-th token, wherever it begins
        return self._stops.push_exempt(text) if self.num_tokens <= self._params.min_tokens else self._stops.push(text)

    def _token_text(self, token: common_pb2.TokenOutput) -> TokenText:
        top = [TopText(*self._spelled(found.token_id), found.logprob) for found in token.top_logprobs]
        return TokenText(*self._spelled(token.token_id), token.logprob, self._text_len, top)

    def _spelled(self, token_id: int) -> tuple[str, bytes]:
        raw = self._tokenizer.token_bytes(token_id)
        return raw.decode("utf-8", "replace"), raw
