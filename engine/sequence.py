"""A sequence as a worker holds it, and the part of it that one step computes. No tensor, so that schedulers run anywhere.

token_ids   [ prompt ............ | output ........ ]
              num_prompt_tokens     num_output_tokens
KV in pages [ num_computed_tokens ........ | to do  ]
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..protocol.durations import seconds
from ..protocol.errors import InternalError, InvalidRequest, PromptTooLong
from ..protocol.sampling import SamplingParams
from ..protocol.v1 import common_pb2


class GrammarState(Protocol):
    """Where a sequence stands in the grammar of its answer: it follows from the grammar and the answer's tokens alone."""

    def fill(self, output_token_ids: Seq[int], words: Any) -> None:
        """Which tokens may come next: words, int32 [ceil(vocab_size / 32)], gets a bit for each token.

        Raises ValueError for tokens that are not within the grammar.
        """
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    deadline: float = float("inf")  # of time.monotonic() in this process
    queue_order: int = 0
    due: float = float("inf")  # its first token, of time.monotonic() in this process; inf: whenever its place comes
    priority: int = 0  # lower is more urgent
    tpot_slo_s: float = 0.0  # that its steps are sized for; 0: the worker's own
    suspect: bool = False  # a worker broke while it computed this: it is computed apart
    root: bytes = b""  # the key before its first block, its tenant's own; empty: the worker's
    num_computed_tokens: int = 0  # their KV stands in pages
    pages: list[int] = field(default_factory=list)
    paced_at: float = 0.0  # its time per output token counts from here, of time.monotonic(); 0: from no token yet
    paced_from: int = 0  # output tokens that it had then
    block_keys: list[bytes] | None = None  # of its leading full blocks, as far as they are known; None: nobody else uses its pages
    num_sound_tokens: int = 0  # of the computed ones: their KV gave finite logits, or came verified
    num_kept_blocks: int = 0  # leading blocks that were offered to others, or are another's
    num_skipped_tokens: int = 0  # of its prompt, computed for another while it waited for its own chunks
    num_prompt_logprobs: int | None = None  # k: its prompt's tokens are scored where they are computed, each with the k likeliest
    num_scored_tokens: int = 1  # of its prompt, that have been; the first has nothing before it
    grammar: GrammarState | None = None  # that sampling.grammar names; set before it is computed
    stop_token_ids: frozenset[int] = field(init=False)  # sampling's; asked for every token, and there may be a thousand

    def __post_init__(self) -> None:
        self.stop_token_ids = frozenset(self.sampling.stop_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_due(self) -> float:
        """due, until it has its first token."""
        return self.due if self.num_output_tokens == 0 else math.inf

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def scores_prompt(self) -> bool:
        """Its prompt has tokens to score: what comes before them has to be computed here, whoever else has it in pages."""
        return self.num_prompt_logprobs is not None and self.num_scored_tokens < self.num_prompt_tokens

    def pace(self, now: float) -> None:
        """It has its first token, in this process."""
        self.paced_from, self.paced_at = self.num_output_tokens, now

    def check_tokens(self, vocab_size: int) -> None:
        """Raises InvalidRequest where there is no token, one that the model does not have, or fewer tokens than the prompt's.

        InternalError for a token behind the prompt that the model does not have: the cluster itself drew it.
        """
        if not 1 <= self.num_prompt_tokens <= self.num_tokens:
            raise InvalidRequest(
                f"num_prompt_tokens is {self.num_prompt_tokens} of {self.num_tokens} token_ids; it must be at least 1 and at most all",
                param="num_prompt_tokens",
            )
        largest = max(self.token_ids)
        if largest < vocab_size:
            return
        if largest > max(self.token_ids[: self.num_prompt_tokens]):
            raise InternalError(f"the cluster drew token {largest} for {self.request_id}; the model has {vocab_size} tokens")
        raise InvalidRequest(f"token {largest} is not of the model's {vocab_size} tokens; use the model's own tokenizer", param="token_ids")

    def check_len(self, max_model_len: int, *, with_answer: bool) -> None:
        """Raises PromptTooLong where the model does not take the tokens and at least one more; with_answer: all of max_tokens."""
        longest = self.num_prompt_tokens + self.sampling.max_tokens
        if with_answer and (longest > max_model_len or self.num_tokens >= max_model_len):
            raise PromptTooLong(
                f"prompt and max_tokens are {self.num_prompt_tokens} + {self.sampling.max_tokens} tokens; the model takes {max_model_len}",
                num_tokens=longest,
                limit=max_model_len,
            )
        if self.num_tokens >= max_model_len:
            raise PromptTooLong(
                f"the prompt has {self.num_tokens} tokens; with at least one of the answer the model takes {max_model_len}",
                num_tokens=self.num_tokens,
                limit=max_model_len - 1,
            )

    def finish_reason(self, eos_token_ids: frozenset[int]) -> common_pb2.FinishReason | None:
        """Whether the last token ends the sequence. Stop strings are the proxy's matter: text is not known here."""
        params = self.sampling
        if self.num_output_tokens == 0:
            return None
        last = self.token_ids[-1]
        stops = last in self.stop_token_ids or (last in eos_token_ids and not params.ignore_eos)
        # with a grammar the mask knows of min_tokens, and lets an answer end that can't go on
        if stops and (self.num_output_tokens >= params.min_tokens or params.grammar is not None):
            return common_pb2.FINISH_REASON_STOP
        if self.num_output_tokens >= params.max_tokens:
            return common_pb2.FINISH_REASON_LENGTH
        return None

    @classmethod
    def from_proto(cls, message: common_pb2.SequenceSpec) -> Sequence:
        sampling = SamplingParams.from_proto(message.sampling)
        return cls(
            request_id=message.request_id,
            token_ids=list(message.token_ids),
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=sampling,
            num_prompt_logprobs=sampling.num_prompt_logprobs,
            deadline=time.monotonic() + seconds(message.deadline_s, "deadline_s"),
            queue_order=message.queue_order,
            due=_moment(message.first_token_due_s) if message.HasField("first_token_due_s") else math.inf,
            priority=message.priority,
            tpot_slo_s=message.tpot_slo_s,
            suspect=message.suspect,
            root=message.root,
        )


def _moment(left_s: float) -> float:
    """Of time.monotonic(). left_s may be below 0."""
    if not math.isfinite(left_s):
        raise InvalidRequest(f"first_token_due_s is {left_s}; it must be a number of seconds", param="first_token_due_s")
    return time.monotonic() + left_s


class StepChunk(NamedTuple):
    """token_ids[start : start + num_tokens] of sequence are computed in this step; the KV before start stands in its pages."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """The step ends with the sequence's last token, so its logits give the next one."""
        return self.start + self.num_tokens == self.sequence.num_tokens

    @property
    def samples(self) -> bool:
        """The step gives the sequence's next token: as is_last, or the chunk is a token that the step before gives."""
        return self.start + self.num_tokens >= self.sequence.num_tokens

    @property
    def is_decode(self) -> bool:
        """The sequence's next token alone, and no part of a prompt that is computed in pieces."""
        return self.num_tokens == 1 and self.samples

    @property
    def scored(self) -> range:
        """Of the sequence's tokens those whose log probabilities the step gives: each follows one that it computes."""
        sequence = self.sequence
        if not sequence.scores_prompt:
            return range(0)
        first = max(self.start + 1, sequence.num_scored_tokens)
        return range(first, min(self.start + self.num_tokens + 1, sequence.num_prompt_tokens))
