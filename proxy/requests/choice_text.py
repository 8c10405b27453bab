"""The text of one choice: what each token adds, where the text ends, how likely each token was."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ...protocol.v1 import common_pb2
from ..request import ProxyRequest
from ..text.detokenizer import StopStrings, create_detokenizer
from ..text.tokenizer import Tokenizer


class TextOptions(NamedTuple):
    """What a request says of its answer's text.

    skip_special_tokens: they have no text.
    include_stop: the stop string or token that ends the text is part of it.
    shown: special tokens that have text in any case.
    """

    skip_special_tokens: bool = True
    include_stop: bool = False
    shown: frozenset[int] = frozenset()


AS_TEXT = TextOptions()


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
    def __init__(
        self,
        tokenizer: Tokenizer,
        request: ProxyRequest,
        stop: Sequence[str],
        eos_token_ids: frozenset[int],
        options: TextOptions = AS_TEXT,
    ) -> None:
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._params = request.sampling
        self._detokenizer = create_detokenizer(
            tokenizer, request.token_ids, skip_special_tokens=options.skip_special_tokens, shown=options.shown
        )
        self._stops = StopStrings(stop, include=options.include_stop)
        # tokens that end the answer are not part of its text
        ending = frozenset(self._params.stop_token_ids) | (frozenset[int]() if self._params.ignore_eos else eos_token_ids)
        self._silent = frozenset[int]() if options.include_stop else ending
        self._special_stops = {token_id: text for text in stop if (token_id := tokenizer.special_token_id(text)) is not None}
        self._last: int | None = None
        self._text_len = 0  # of everything decoded, held back or not

    @property
    def matched_stop(self) -> str | None:
        """Set as soon as the text is complete, whatever tokens follow."""
        return self._stops.matched

    def stop_reason(self, own_stops: Collection[int]) -> str | int | None:
        """Of an answer that stopped: the stop string, or the token, if it is of own_stops. None: the model's EOS."""
        if self._stops.matched is not None or self._last is None:
            return self._stops.matched
        return self._special_stops.get(self._last) or (self._last if self._last in own_stops else None)

    def push(self, token_ids: list[int], outputs: list[common_pb2.TokenOutput]) -> Pushed:
        """Leaves out tokens after a stop string. outputs: of the same tokens, if logprobs were asked for."""
        if len(token_ids) == 1 and not outputs:
            self.num_tokens += 1
            self._last = token_ids[0]
            return Pushed(self._text_of(token_ids[0]), token_ids, outputs, [])
        out: list[str] = []
        texts: list[TokenText] = []
        for position, token_id in enumerate(token_ids):
            self.num_tokens += 1
            self._last = token_id
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
        if token_id in self._silent and (self.num_tokens >= self._params.min_tokens or self._params.grammar is not None):
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
