"""From logits and sequences to tokens: what a request asked for, applied to its row.

raw logits ─┬─► log_softmax ─► logprobs
            └─► penalties ─► logit_bias ─► min_tokens ban ─► kernels.sampling (temperature, filters, draw) ─► token
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from ..kernels.sampling import sampling
from ..protocol.sampling import SamplingParams
from .executor import TokenSample
from .sequence import Sequence
from .staging import read_back


def sample(logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> list[TokenSample]:
    """logits: fp32 [len(sequences), vocab_size], not changed."""
    adjusted = _adjust(logits, sequences, eos_token_ids)
    params = [sequence.sampling for sequence in sequences]
    if all(one.greedy for one in params):
        tokens = adjusted.argmax(dim=-1)
    else:
        indices = [sequence.num_output_tokens for sequence in sequences]
        tokens = _draw(adjusted, params, indices)
    token_ids = read_back(tokens).tolist()
    if all(one.num_logprobs is None for one in params):
        return [TokenSample(token_id, None, []) for token_id in token_ids]
    return _with_logprobs(logits, token_ids, params)


def _draw(logits: torch.Tensor, params: Seq[SamplingParams], indices: list[int]) -> torch.Tensor:
    def column(values: Seq[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    seeds = np.array([one.seed for one in params], dtype=np.uint64).view(np.int64)
    return sampling(
        logits,
        column([one.temperature for one in params], torch.float32),
        column([one.top_k for one in params], torch.int64),
        column([one.top_p for one in params], torch.float32),
        column([one.min_p for one in params], torch.float32),
        torch.from_numpy(seeds).to(logits.device),
        column(indices, torch.int64),
    )


def _adjust(logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """A changed copy, or logits itself where no row asks for a change."""
    penalised = [row for row, sequence in enumerate(sequences) if sequence.sampling.needs_penalties]
    added = _additions(sequences, eos_token_ids, logits.shape[1])
    if not penalised and not added:
        return logits
    logits = logits.clone()
    if penalised:
        _penalise(logits, penalised, [sequences[row] for row in penalised])
    if added:
        rows, tokens, values = zip(*added, strict=True)
        where = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
        logits.index_put_(where, torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)
    return logits


def _additions(sequences: Seq[Sequence], eos_token_ids: frozenset[int], vocab_size: int) -> list[tuple[int, int, float]]:
    """(row, token, what is added to its logit): logit_bias, and -inf for what would end a sequence before min_tokens."""
    added: list[tuple[int, int, float]] = []
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        added += ((row, token, bias) for token, bias in params.logit_bias.items())
        if sequence.num_output_tokens < params.min_tokens:
            ending = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
            added += ((row, token, float("-inf")) for token in ending)
    # an id beyond the vocabulary can't be drawn: nothing to add to
    return [item for item in added if item[1] < vocab_size]


def _penalise(logits: torch.Tensor, rows: list[int], sequences: Seq[Sequence]) -> None:
    """In place. Repetition penalty (Keskar et al., 2019) over prompt and output, presence and frequency over the output."""
    vocab_size = logits.shape[1]
    seen = np.zeros((len(rows), vocab_size), dtype=bool)
    counts = np.zeros((len(rows), vocab_size), dtype=np.float32)
    for index, sequence in enumerate(sequences):
        seen[index, sequence.token_ids] = True
        np.add.at(counts[index], sequence.token_ids[sequence.num_prompt_tokens :], 1.0)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    params = [sequence.sampling for sequence in sequences]
    repetition = column([one.repetition_penalty for one in params])
    presence, frequency = column([one.presence_penalty for one in params]), column([one.frequency_penalty for one in params])
    occurrences = torch.from_numpy(counts).to(logits.device)
    changed = logits[rows]
    repeated = torch.where(changed > 0, changed / repetition, changed * repetition)
    changed = torch.where(torch.from_numpy(seen).to(logits.device), repeated, changed)
    logits[rows] = changed - frequency * occurrences - presence * (occurrences > 0)


def _with_logprobs(logits: torch.Tensor, token_ids: list[int], params: Seq[SamplingParams]) -> list[TokenSample]:
    rows = [row for row, one in enumerate(params) if one.num_logprobs is not None]
    logprobs = logits[rows].log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor([token_ids[row] for row in rows], device=logits.device).unsqueeze(1)).squeeze(1)
    num_top = min(max(params[row].num_logprobs or 0 for row in rows), logits.shape[1])
    top = logprobs.topk(num_top, dim=-1)
    samples = [TokenSample(token_id, None, []) for token_id in token_ids]
    found = (read_back(tensor).tolist() for tensor in (chosen, top.indices, top.values))
    for row, logprob, tokens, values in zip(rows, *found, strict=True):
        pairs = list(zip(tokens, values, strict=True))
        samples[row] = TokenSample(token_ids[row], logprob, pairs[: params[row].num_logprobs])
    return samples
