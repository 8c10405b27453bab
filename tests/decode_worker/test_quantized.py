"""Quantised models through prefill, store and decode."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

NUM_TOKENS = 24


def prompt(num_tokens: int) -> list[int]:
    return random.Random(num_tokens).choices(range(3, 256), k=num_tokens)


@pytest.mark.parametrize("form", ["awq", "w4a16"])
async def test_an_int4_checkpoints_tokens_are_those_of_its_plain_weights(make_cluster: Any, quantized: Any, form: str) -> None:
    folder = quantized(form)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32).eval()
    cluster = await make_cluster("auto", folder / "quantized", prefill={"max_tokens_per_step": 24})
    for num_tokens in (1, 31, 100):
        ids = torch.tensor([prompt(num_tokens)])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=256, pad_token_id=0
            )
        answer = await cluster.run(prompt(num_tokens), max_tokens=NUM_TOKENS)
        assert answer.token_ids == out[0, num_tokens:].tolist()
    await cluster.at_rest()


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
async def test_a_model_quantised_at_load_serves_and_meets_its_own_prefixes(make_cluster: Any, checkpoint: Any, kind: str) -> None:
    cluster = await make_cluster("auto", checkpoint("qwen2").folder, quantization=kind)
    await cluster.run(prompt(100), max_tokens=8)
    again = await cluster.run(prompt(100), max_tokens=8)
    assert again.state.num_cached_tokens == 99 and len(again.token_ids) == 8
    await cluster.at_rest()
