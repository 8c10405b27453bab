"""Conversations as rows of token ids with a weight for each token; a batch is a pure function of (seed, step).

step ─► curriculum ─► row length ─► conversations ─► ids [rows, length] uint16, weights [rows, length] float32
                                                     answers weigh 1, all other text a little
"""

from random import Random
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from .text import Conversation, Kind, conversation
from .tokenizer import ASSISTANT, BEGIN, END, PAD, SYSTEM, USER
from .words import Words

CHARS_PER_TOKEN = 3.3
"""A little more than the text has, so that a row is full."""
TEXT_WEIGHT = 0.05
# From this step on: how often each row length is drawn.
CURRICULUM: tuple[tuple[int, dict[int, float]], ...] = (
    (0, {256: 1.0}),
    (600, {256: 0.5, 512: 0.5}),
    (1500, {256: 0.2, 512: 0.4, 1024: 0.4}),
    (2500, {256: 0.1, 512: 0.2, 1024: 0.3, 2048: 0.4}),
    (4000, {256: 0.1, 512: 0.15, 1024: 0.2, 2048: 0.3, 4096: 0.25}),
)


class Answer(NamedTuple):
    """Where an answer with its end token stands: ids[start:end]."""

    start: int
    end: int
    kind: Kind


class Encoder:
    """Turns conversations into ids as the chat template does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.pad, self.begin, self.end = self._id(PAD), self._id(BEGIN), self._id(END)
        self._roles = {"system": self._id(SYSTEM), "user": self._id(USER), "assistant": self._id(ASSISTANT)}

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        assert found is not None, f"the tokenizer has no {token}"
        return found

    def text(self, text: str) -> list[int]:
        """Ids of plain text without a begin token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def conversation(self, talk: Conversation) -> tuple[list[int], list[Answer]]:
        """Ids of the whole conversation, and where its answers stand."""
        ids, answers = [self.begin], []
        encoded = self._tokenizer.encode_batch_fast([turn.text for turn in talk.turns], add_special_tokens=False)
        for turn, encoding in zip(talk.turns, encoded, strict=True):
            if not talk.is_raw:
                ids.append(self._roles[turn.role])
            start = len(ids)
            ids += encoding.ids
            if not talk.is_raw or turn.kind:
                ids.append(self.end)
            if turn.kind:
                answers.append(Answer(start, len(ids), turn.kind))
        return ids, answers


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch number `step` of a seed: about `batch_tokens` tokens in rows of one length."""

    def __init__(self, tokenizer_file: str, seed: int, steps: int, batch_tokens: int) -> None:
        self.tokenizer_file = tokenizer_file
        self.seed = seed
        self.steps = steps
        self.batch_tokens = batch_tokens
        self.words = Words("train")
        self._encoder: Encoder | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        if self._encoder is None:
            self._encoder = Encoder(Tokenizer.from_file(self.tokenizer_file))
        rng = Random(f"{self.seed} {step}")
        length = row_length(rng, step)
        rows = max(1, self.batch_tokens // length)
        ids = np.full((rows, length), self._encoder.pad, dtype=np.uint16)
        weights = np.zeros((rows, length), dtype=np.float32)
        for row in range(rows):
            self._fill(rng, ids[row], weights[row])
        return torch.from_numpy(ids), torch.from_numpy(weights)

    def _fill(self, rng: Random, ids: np.ndarray, weights: np.ndarray) -> None:
        assert self._encoder is not None
        length = len(ids)
        tokens, answers = self._encoder.conversation(conversation(rng, self.words, int(length * CHARS_PER_TOKEN)))
        kept = min(length, len(tokens))
        ids[:kept] = tokens[:kept]
        weights[:kept] = TEXT_WEIGHT
        for answer in answers:
            weights[answer.start : answer.end] = 1.0


def row_length(rng: Random, step: int) -> int:
    """The row length of a step, drawn by the curriculum."""
    shares = next(shares for start, shares in reversed(CURRICULUM) if step >= start)
    return rng.choices(list(shares), list(shares.values()))[0]
