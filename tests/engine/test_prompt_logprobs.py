"""Log probabilities of prompts' own tokens, against transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from halfmoon.engine import prompt_logprobs as module
from halfmoon.engine.executor import MAX_MESSAGE_LOGPROBS, PromptLogprobs
from halfmoon.engine.sequence import Sequence, StepChunk

VARIANTS = ["llama3_gqa", "llama_linear_tied", "mistral_window", "qwen2", "qwen3_window"]


def expected(model: Any, token_ids: list[int]) -> torch.Tensor:
    """fp32 [tokens - 1, vocab_size]: row i is what may follow token i."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(dim=-1)


def scored_sequence(rig: Any, token_ids: list[int], num_top: int | None) -> Sequence:
    sequence = rig.sequence(token_ids)
    sequence.num_prompt_logprobs = num_top
    return sequence


def run(rig: Any, chunks: list[StepChunk]) -> dict[Sequence, PromptLogprobs]:
    _, found = rig.engine.forward_scored(chunks)
    for sequence, scored in found.items():
        sequence.num_scored_tokens = scored.start + len(scored.logprobs)
    return found


def check(found: PromptLogprobs, reference: torch.Tensor, token_ids: list[int], num_top: int) -> None:
    stop = found.start + len(found.logprobs)
    rows = reference[found.start - 1 : stop - 1]
    targets = torch.tensor(token_ids[found.start : stop]).unsqueeze(1)
    chosen = rows.gather(1, targets)
    np.testing.assert_allclose(found.logprobs, chosen.squeeze(1), atol=1e-3)
    assert found.ranks.tolist() == ((rows > chosen).sum(dim=1) + 1).tolist()
    top = rows.topk(num_top, dim=1)
    assert found.top_token_ids.tolist() == top.indices.tolist()
    np.testing.assert_allclose(found.top_logprobs, top.values, atol=1e-3)


@pytest.mark.parametrize("max_logits", [1, 256 * 7, 2**24])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_token_of_a_prompt_is_as_likely_as_transformers_says(
    lab: Callable[..., Any], checkpoint: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, name: str, max_logits: int
) -> None:
    monkeypatch.setattr(module, "MAX_LOGITS", max_logits)
    made = checkpoint(name)
    rig, long, short, plain = lab(made.folder), prompts(70), prompts(23, 1), prompts(30, 2)
    first, second, other = scored_sequence(rig, long, 5), scored_sequence(rig, short, 0), scored_sequence(rig, plain, None)
    wanted, other_wanted = expected(made.model, long), expected(made.model, short)
    found = run(rig, [StepChunk(first, 0, 32), StepChunk(other, 0, 30), StepChunk(second, 0, 23)])
    assert set(found) == {first, second} and (found[first].start, found[second].start) == (1, 1)
    assert len(found[first].logprobs) == 32 and len(found[second].logprobs) == 22, "nothing follows a prompt's last token"
    check(found[first], wanted, long, 5)
    check(found[second], other_wanted, short, 0)
    rest = run(rig, [StepChunk(other, 29, 1), StepChunk(first, 32, 38)])[first]
    assert rest.start == 33 and len(rest.logprobs) == 37
    check(rest, wanted, long, 5)
    assert not first.scores_prompt and not run(rig, [StepChunk(first, 0, 70)]), "what is scored is not scored again"


def test_tokens_behind_the_prompt_are_not_scored(lab: Callable[..., Any], checkpoint: Any, prompts: Any) -> None:
    rig = lab(checkpoint("llama3_gqa").folder)
    replayed = scored_sequence(rig, prompts(20), 1)
    replayed.num_prompt_tokens = 12
    assert len(run(rig, [StepChunk(replayed, 0, 20)])[replayed].logprobs) == 11


def test_logits_that_are_no_numbers_give_no_log_probability(lab: Callable[..., Any], checkpoint: Any, prompts: Any) -> None:
    rig = lab(checkpoint("llama3_gqa").folder)
    head = rig.engine._decoder.head

    def broken(*rows: torch.Tensor) -> torch.Tensor:
        logits = head(*rows)
        logits[3:4, 0] = torch.inf
        return logits

    rig.engine._decoder.head = broken
    found = rig.engine.forward_scored([StepChunk(scored_sequence(rig, prompts(9), 0), 0, 9)])[1]
    assert np.isnan(next(iter(found.values())).logprobs).tolist() == [row == 3 for row in range(8)]


@pytest.mark.parametrize("num_top", [0, 5, 20])
def test_a_long_prompt_travels_in_messages_of_bounded_size(num_top: int) -> None:
    num_tokens = 20_000
    values = np.arange(num_tokens * num_top, dtype=np.float32).reshape(num_tokens, num_top)
    whole = PromptLogprobs(7, np.arange(num_tokens, dtype=np.float32), np.arange(num_tokens), values.astype(np.int64), values)
    parts = list(whole.to_protos())
    assert all(len(part.logprobs) * (1 + num_top) <= MAX_MESSAGE_LOGPROBS and part.ByteSize() < 2**17 for part in parts)
    assert [logprob for part in parts for logprob in part.logprobs] == whole.logprobs.tolist()
    assert [rank for part in parts for rank in part.ranks] == whole.ranks.tolist()
    assert [value for part in parts for value in part.top_logprobs] == values.ravel().tolist()
    assert [token_id for part in parts for token_id in part.top_token_ids] == values.ravel().tolist()
    starts = [part.start for part in parts]
    assert starts == [7 + sum(len(part.logprobs) for part in parts[:index]) for index in range(len(parts))]
