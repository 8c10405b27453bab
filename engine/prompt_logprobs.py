"""Log probabilities of a prompt's own tokens, from the rows that the decoder's layers give of its chunks.

chunk's rows, but for the prompt's last ─► head, so many rows at a time ─► logsumexp, top k ─► a few numbers a row ─► the host

The logits of a chunk may be thousands of rows of a vocabulary: they never stand in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch

from .executor import PromptLogprobs
from .sequence import Sequence, StepChunk
from .staging import read_back

MAX_LOGITS = 2**24
"""At a time: 64 MiB of fp32, and a few temporaries of that size. At least one row."""

Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden, residual), rows of the layers' results ─► fp32 logits [rows, vocab_size]"""


def prompt_logprobs(
    head: Head, hidden: torch.Tensor, residual: torch.Tensor, chunks: Seq[StepChunk], vocab_size: int
) -> dict[Sequence, PromptLogprobs]:
    """Of each chunk that scores its prompt's tokens. hidden, residual: [tokens of all chunks, hidden_size], in the chunks' order."""
    found: dict[Sequence, PromptLogprobs] = {}
    first_row = 0
    for chunk in chunks:
        if scored := chunk.scored:
            begin = first_row + scored.start - 1 - chunk.start  # the row before a token gives its logits
            rows = slice(begin, begin + len(scored))
            found[chunk.sequence] = _of_rows(head, hidden[rows], residual[rows], chunk.sequence, scored, vocab_size)
        first_row += chunk.num_tokens
    return found


def _of_rows(
    head: Head, hidden: torch.Tensor, residual: torch.Tensor, sequence: Sequence, scored: range, vocab_size: int
) -> PromptLogprobs:
    targets = torch.tensor(sequence.token_ids[scored.start : scored.stop], device=hidden.device)
    num_top = min(sequence.num_prompt_logprobs or 0, vocab_size)
    pieces = list(_pieces(head, hidden, residual, targets, num_top, max(1, MAX_LOGITS // vocab_size)))
    chosen, ranks, top_token_ids, top = (read_back(torch.cat(column)).numpy() for column in zip(*pieces, strict=True))
    return PromptLogprobs(scored.start, chosen, ranks, top_token_ids, top)


def _pieces(
    head: Head, hidden: torch.Tensor, residual: torch.Tensor, targets: torch.Tensor, num_top: int, num_rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """PromptLogprobs' columns of num_rows rows at a time."""
    for begin in range(0, len(targets), num_rows):
        logits = head(hidden[begin : begin + num_rows], residual[begin : begin + num_rows])
        total = logits.logsumexp(dim=-1, keepdim=True)
        total = torch.where(total.isfinite(), total, torch.nan)  # of a row that is no numbers, nothing is a log probability
        chosen = logits.gather(1, targets[begin : begin + num_rows].unsqueeze(1))
        top = logits.topk(num_top, dim=-1)
        yield (chosen - total).squeeze(1), (logits > chosen).sum(dim=-1) + 1, top.indices, top.values - total
