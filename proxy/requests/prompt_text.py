"""The tokens of a prompt with their texts and log probabilities, as a choice's workers have sent them.

common_pb2.PromptLogprobs … ─► a few tokens at a time, and the event loop turns between them ─► PromptToken …
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import NamedTuple

from ...protocol.v1 import common_pb2
from ..text.detokenizer import create_detokenizer
from ..text.tokenizer import Tokenizer

MAX_TURN_TOKENS = 128  # about 2 ms; each is decoded twice where the tokenizer is not byte-level
MAX_TURN_TEXTS = 512  # of the likeliest tokens among them


class Likely(NamedTuple):
    token_id: int
    text: str
    logprob: float


class PromptToken(NamedTuple):
    token_id: int
    text: str  # of the token by itself; "�" for part of a character
    logprob: float | None  # None: the prompt's first, before which there is nothing
    rank: int  # among all tokens, 1 the likeliest; 0: the first
    text_offset: int  # in the prompt's text, where the token begins
    text_end: int
    top: list[Likely]  # likeliest first


class PromptText:
    """logprobs: in order, of every token but the first."""

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[common_pb2.PromptLogprobs]) -> None:
        self.num_tokens = len(token_ids)
        self._tokenizer = tokenizer
        self._token_ids = token_ids
        self._logprobs = logprobs
        self._texts: dict[int, str] = {}  # of tokens that have been seen: the likeliest are often the same

    async def parts(self) -> AsyncIterator[list[PromptToken]]:
        """All tokens, in order. The caller's own work on a part of them comes to a few milliseconds, too."""
        num_texts, part = 0, list[PromptToken]()
        for token in self._tokens():
            part.append(token)
            num_texts += len(token.top)
            if len(part) == MAX_TURN_TOKENS or num_texts >= MAX_TURN_TEXTS:
                yield part
                num_texts, part = 0, []
                await asyncio.sleep(0)
        if part:
            yield part

    def _tokens(self) -> Iterator[PromptToken]:
        detokenizer, end = create_detokenizer(self._tokenizer), 0
        scores = self._scores()
        for index, token_id in enumerate(self._token_ids):
            begin, end = end, end + len(detokenizer.push(token_id))
            logprob, rank, top = next(scores) if index else (None, 0, [])
            yield PromptToken(token_id, self._text(token_id), logprob, rank, begin, end, top)

    def _scores(self) -> Iterator[tuple[float, int, list[Likely]]]:
        for columns in self._logprobs:
            num_top = len(columns.top_token_ids) // max(len(columns.logprobs), 1)
            for row, (logprob, rank) in enumerate(zip(columns.logprobs, columns.ranks, strict=True)):
                places = slice(row * num_top, (row + 1) * num_top)
                found = zip(columns.top_token_ids[places], columns.top_logprobs[places], strict=True)
                yield logprob, rank, [Likely(token_id, self._text(token_id), value) for token_id, value in found]

    def _text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.token_text(token_id)
        return text
