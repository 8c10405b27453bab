"""From logits and sequences to tokens: what a request asked for, applied to its row.

raw logits ─┬─► log_softmax ─► logprobs
            └─► penalties ─► logit_bias ─► min_tokens ban ─► grammar ─► kernels.sampling (temperature, filters, draw) ─► token
                                                                    └─ none: NOT_FINITE, or NOTHING_LEFT where bans took all
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from ..kernels.sampling import NO_TOKEN, likeliest, sampling
from ..kernels.token_mask import token_mask
from ..protocol.sampling import SamplingParams
from .executor import NOT_FINITE, NOTHING_LEFT, TokenSample
from .sequence import Sequence
from .staging import read_back
from .token_masks import TokenMasks, make_masks

LARGEST = torch.finfo(torch.float32).max


def sample(
    logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], masks: TokenMasks | None = None
) -> list[TokenSample]:
    """logits: fp32 [len(sequences), vocab_size], not changed. A row without a token to draw leaves the others as they are.

    masks: of the sequences with a grammar. None: they are made here.
    """
    adjusted = _adjust(logits, sequences, eos_token_ids, masks)
    params = [sequence.sampling for sequence in sequences]
    if all(one.greedy for one in params):
        tokens = likeliest(adjusted)
    else:
        indices = [sequence.num_output_tokens for sequence in sequences]
        tokens = _draw(adjusted, params, indices)
    token_ids = read_back(tokens).tolist()
    if NO_TOKEN in token_ids:
        token_ids = _told_apart(token_ids, logits)
    if all(one.num_logprobs is None for one in params):
        return [TokenSample(token_id, None, []) for token_id in token_ids]
    return _with_logprobs(logits, token_ids, params)


def _told_apart(token_ids: list[int], logits: torch.Tensor) -> list[int]:
    """Why a row has no token: the model's own logits are no numbers, or nothing of them is left."""
    sound = likeliest(logits) != NO_TOKEN
    reasons = [NOTHING_LEFT if one else NOT_FINITE for one in read_back(sound).tolist()]
    return [reason if token_id == NO_TOKEN else token_id for token_id, reason in zip(token_ids, reasons, strict=True)]


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


def _adjust(logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], masks: TokenMasks | None) -> torch.Tensor:
    """A changed copy, or logits itself where no row asks for a change."""
    penalised = [row for row, sequence in enumerate(sequences) if sequence.sampling.needs_penalties]
    added = _additions(sequences, eos_token_ids, logits.shape[1])
    masked = [row for row, sequence in enumerate(sequences) if sequence.grammar is not None]
    if not penalised and not added and not masked:
        return logits
    logits = logits.clone()
    if penalised:
        _penalise(logits, penalised, [sequences[row] for row in penalised])
    if added:
        rows, tokens, values = zip(*added, strict=True)
        where = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
        logits.index_put_(where, torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)
    if masked:
        _mask(logits, masks or make_masks(sequences, masked, -(-logits.shape[1] // 32)))
    return logits


def _mask(logits: torch.Tensor, masks: TokenMasks) -> None:
    device = logits.device
    token_mask(logits, torch.tensor(masks.rows, device=device), torch.from_numpy(masks.words).to(device))


def _additions(sequences: Seq[Sequence], eos_token_ids: frozenset[int], vocab_size: int) -> list[tuple[int, int, float]]:
    """(row, token, what is added to its logit): logit_bias, and -inf for what would end a sequence before min_tokens."""
    added: list[tuple[int, int, float]] = []
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        added += ((row, token, bias) for token, bias in params.logit_bias.items())
        if sequence.num_output_tokens < params.min_tokens and sequence.grammar is None:
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
    raw = logits[rows]
    repeated = torch.where(raw > 0, raw / repetition, raw * repetition)
    changed = torch.where(torch.from_numpy(seen).to(logits.device), repeated, raw)
    changed = changed - frequency * occurrences - presence * (occurrences > 0)
    # a finite logit stays finite, however large it is; what was none stays what it was
    logits[rows] = torch.where(raw.isfinite(), changed.clamp(-LARGEST, LARGEST), raw)


def _with_logprobs(logits: torch.Tensor, token_ids: list[int], params: Seq[SamplingParams]) -> list[TokenSample]:
    samples = [TokenSample(token_id, None, []) for token_id in token_ids]
    rows = [row for row, one in enumerate(params) if one.num_logprobs is not None and token_ids[row] >= 0]
    if not rows:
        return samples
    logprobs = logits[rows].log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor([token_ids[row] for row in rows], device=logits.device).unsqueeze(1)).squeeze(1)
    num_top = min(max(params[row].num_logprobs or 0 for row in rows), logits.shape[1])
    top = logprobs.topk(num_top, dim=-1)
    found = (read_back(tensor).tolist() for tensor in (chosen, top.indices, top.values))
    for row, logprob, tokens, values in zip(rows, *found, strict=True):
        pairs = list(zip(tokens, values, strict=True))
        samples[row] = TokenSample(token_ids[row], logprob, pairs[: params[row].num_logprobs])
    return samples
