"""Every supported architecture and variant through prefill, store and decode: transformers' greedy tokens, 64 of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

NUM_TOKENS = 64
VARIANTS = (
    "llama2_mha", "llama3_gqa", "llama_linear_tied", "llama_biased", "mistral_window", "mistral_full", "qwen2", "qwen2_window",
    "qwen25_tied", "qwen3", "qwen3_window", "sparse_mixtral", "sparse_qwen3_moe",
)  # fmt: skip


def prompt(num_tokens: int) -> list[int]:
    return random.Random(num_tokens).choices(range(3, 256), k=num_tokens)


def greedy(model: Any, token_ids: list[int], draft: list[int]) -> list[int]:
    """draft: an answer to check in one forward pass. Where a token of it is not transformers' choice after those before it, their own
    generate gives the answer, in a pass a token."""
    with torch.inference_mode():
        ids = torch.tensor([[*token_ids, *draft]])
        choices = model(ids).logits[0, len(token_ids) - 1 : -1].argmax(-1).tolist()
        if len(draft) == NUM_TOKENS and choices == draft:
            return draft
        ids = ids[:, : len(token_ids)]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=256, pad_token_id=0
        )
    return out[0, len(token_ids) :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
async def test_disaggregated_tokens_are_those_of_transformers(make_cluster: Any, checkpoint: Any, variant: str) -> None:
    """Prompts of one token to several chunks; the last one again with a prefix hit in the pages, over both transports."""
    made = checkpoint(variant)
    expected: dict[int, list[int]] = {}
    # what has arrived shows in the first tokens after it; the others are the decode worker's own matter
    for transport, num_compared in (("auto", NUM_TOKENS), ("grpc", 8)):
        cluster = await make_cluster(transport, made.folder, prefill={"max_tokens_per_step": 24})
        for num_tokens in (1, 8, 31, 100):
            answer = (await cluster.run(prompt(num_tokens), max_tokens=num_compared)).token_ids
            if num_tokens not in expected:
                expected[num_tokens] = greedy(made.model, prompt(num_tokens), answer)
            assert answer == expected[num_tokens][:num_compared], f"{variant}, {num_tokens} tokens over {transport}"
        again = await cluster.run(prompt(100), max_tokens=num_compared)
        assert again.state.num_cached_tokens == 99, "all but the last, which gives the first logits"
        assert again.token_ids == expected[100][:num_compared]
        await cluster.at_rest()
