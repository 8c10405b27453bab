"""Prefixes in a GPU's pages, end to end on loopback, against transformers' greedy generate in fp32 on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"), pytest.mark.timeout(600)]

VOCAB_SIZE, PAGE_SIZE = 160, 16
OPTIONS = {"device": "cuda", "dtype": "float32", "block_size": PAGE_SIZE, "max_model_len": 2048}
STEPS: dict[str, Any] = {"prefill": {"max_tokens_per_step": 96, "kv_capacity_tokens": 8192}, "decode": {"kv_capacity_tokens": 8192}}
FORMS = ["coupled", "1P1D"]


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, initializer_range=0.25, bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(reference: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "small"
    reference.save_pretrained(found)
    return found


@pytest.fixture
async def make(make_cluster: Any, folder: Path) -> Callable[..., Any]:
    """make(form, **options) -> the cluster, and what runs a request in it."""

    async def made(form: str, decode: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
        settings = STEPS | {"decode": {**STEPS["decode"], "max_prefill_tokens_per_step": 96, **(decode or {})}}
        cluster = await make_cluster(folder=folder, arena_bytes=64 * 2**20, **settings, **OPTIONS, **options)
        return cluster, cluster.run_local if form == "coupled" else cluster.run

    return made


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, VOCAB_SIZE), k=num_tokens)


def is_greedy(reference: LlamaForCausalLM, token_ids: list[int], answer: list[int]) -> bool:
    """Each token is the likeliest behind those before it, or as likely but for rounding."""
    with torch.inference_mode():
        logits = reference(torch.tensor([[*token_ids, *answer]])).logits[0, len(token_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    return bool((logits.max(dim=1).values - chosen < 1e-3).all())


def hits(cluster: Any) -> float:
    return sum(
        worker.metrics.registry.get_sample_value("halfmoon_prefix_cache_hits_total", {"tier": "hbm"}) or 0.0 for worker in cluster.workers
    )


@pytest.mark.parametrize("form", FORMS)
async def test_tokens_are_the_cpus_with_hits_at_block_ends_inside_blocks_and_of_whole_prompts(make: Any, reference: Any, form: str) -> None:
    cluster, run = await make(form)
    text = prompt(900)
    for num_tokens in (500, 500, 512, 513, 777, 300, 31, 900, 900):
        tokens = [*text[:num_tokens], 7]
        answer = await run(tokens, max_tokens=24)
        assert len(answer.token_ids) == 24 and is_greedy(reference, tokens, answer.token_ids), num_tokens
        turn = [*tokens, *answer.token_ids, 5, 6]
        assert is_greedy(reference, turn, (await run(turn, max_tokens=8)).token_ids), num_tokens
    assert hits(cluster) > 500
    await cluster.at_rest()


@pytest.mark.parametrize("form", FORMS)
async def test_seeded_tokens_are_the_same_with_hits_and_without(make: Any, form: str) -> None:
    found: list[list[list[int]]] = []
    for prefix_cache_hbm in (False, True):
        cluster, run = await make(form, prefix_cache_hbm=prefix_cache_hbm)
        sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 77}
        found.append([(await run(prompt(900)[:size], max_tokens=20, **sampling)).token_ids for size in (600, 600, 640, 345, 700)])
        await cluster.at_rest()
    assert found[0] == found[1]


async def test_cancelled_and_concurrent_requests_over_few_pages_leave_every_page_free(make: Any, reference: Any) -> None:
    cluster, _ = await make("1P1D", decode={"kv_capacity_tokens": 1600})
    texts = [prompt(500), [*prompt(500)[:270], *prompt(230, 1)], [*prompt(500)[:275], *prompt(225, 2)]]

    def is_right(tokens: list[int], answer: list[int], num_tokens: int) -> bool:
        return len(answer) == num_tokens and is_greedy(reference, tokens, answer)

    await cluster.any_mix(random.Random(5), texts, 60, 12, 8, is_right)
    await cluster.every_page_is_free()
