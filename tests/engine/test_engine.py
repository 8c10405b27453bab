"""The engine against transformers' own models, in fp32 on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halfmoon.engine.sequence import StepChunk
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.errors import ConfigError

NUM_TOKENS = 64
VARIANT_NAMES = [
    "llama2_mha",
    "llama3_gqa",
    "llama_linear_tied",
    "llama_biased",
    "mistral_window",
    "mistral_full",
    "qwen2",
    "qwen2_window",
    "qwen25_tied",
    "qwen3",
    "qwen3_window",
    "rope_dynamic",
    "rope_yarn",
    "sparse_mixtral",
    "sparse_qwen3_moe",
    "sparse_qwen3_some_dense",
]


def generate(model: Any, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    """transformers' greedy answer, end-of-sequence tokens passed over."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def reference_logits(model: Any, token_ids: list[int], num_rows: int) -> torch.Tensor:
    """Of the last num_rows positions, by one dense forward pass."""
    return model(torch.tensor([token_ids])).logits[0, -num_rows:]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert error.max() < 1e-4, f"relative error {error.max():.2e} at row {error.argmax()}"


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_greedy_tokens_and_logits_equal_transformers(variant, checkpoint, lab, prompts):
    """Prompts of one token to several chunks in one batch: chunks of prompts run beside decode tokens of others."""
    model = checkpoint(variant).model
    ours = lab(checkpoint(variant).folder)
    sequences = [ours.sequence(prompts(length), max_tokens=NUM_TOKENS) for length in (1, 7, 16, 37)]
    logits = ours.run(sequences, chunk_len=11, until=NUM_TOKENS)
    for sequence in sequences:
        theirs = reference_logits(model, sequence.token_ids[:-1], NUM_TOKENS)
        assert sequence.token_ids[sequence.num_prompt_tokens :] == theirs.argmax(-1).tolist(), "each the choice after those before it"
        assert_close(torch.stack(logits[sequence.request_id]), theirs)


@pytest.mark.parametrize("chunk_len", [1, 3, 8, 13, 64])
def test_the_size_of_prefill_chunks_does_not_change_the_logits(chunk_len, checkpoint, lab, prompts):
    made = checkpoint("mistral_window")
    ours = lab(made.folder)
    sequence = ours.sequence(prompts(53), max_tokens=1)
    logits = ours.run([sequence], chunk_len, until=1)[sequence.request_id]
    assert_close(logits[0][None], reference_logits(made.model, sequence.token_ids[:-1], 1))


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_the_size_of_pages_does_not_change_the_logits(block_size, checkpoint, lab, prompts):
    made = checkpoint("llama3_gqa")
    ours = lab(made.folder, block_size=block_size)
    sequences = [ours.sequence(prompts(length), max_tokens=6) for length in (5, 31)]
    logits = ours.run(sequences, chunk_len=9, until=6)
    for sequence in sequences:
        assert_close(torch.stack(logits[sequence.request_id]), reference_logits(made.model, sequence.token_ids[:-1], 6))


def test_logits_come_only_for_chunks_that_reach_their_sequences_end_and_in_order(checkpoint, lab, prompts):
    made = checkpoint("qwen2")
    ours = lab(made.folder)
    whole, part, other = (ours.sequence(prompts(length), max_tokens=1) for length in (9, 20, 4))
    logits = ours.engine.forward([StepChunk(whole, 0, 9), StepChunk(part, 0, 12), StepChunk(other, 0, 4)])
    assert_close(logits[:1], reference_logits(made.model, whole.token_ids, 1))
    assert_close(logits[1:], reference_logits(made.model, other.token_ids, 1))
    assert ours.engine.forward([StepChunk(part, 12, 5)]).shape == (0, ours.engine.config.vocab_size)


def test_a_prefix_moved_through_blocks_into_another_cache_is_continued(checkpoint, lab, prompts):
    """What a hand-off does: pages out of one engine, byte by byte into other pages of another, layer by layer."""
    made = checkpoint("qwen3")
    first, second = lab(made.folder), lab(made.folder)
    prompt = prompts(43)
    sender = first.sequence(prompt, max_tokens=NUM_TOKENS)
    first.run([sender], chunk_len=16, until=1)
    second.allocator.allocate(5)
    receiver = second.sequence(prompt, max_tokens=NUM_TOKENS)
    num_pages = -(-len(prompt) // first.engine.page_size)
    into = receiver.pages[:num_pages]
    assert into != sender.pages[:num_pages]
    for layer in range(first.engine.config.num_layers):
        if layer % 2:
            second.engine.cache.write_blocks(layer, into, first.engine.cache.read_blocks(layer, sender.pages[:num_pages]))
        else:
            second.engine.cache.write_bytes(layer, into, list(first.engine.cache.read_bytes(layer, sender.pages[:num_pages])))
    receiver.token_ids.append(sender.token_ids[-1])
    receiver.num_computed_tokens = len(prompt)
    second.run([receiver], chunk_len=16, until=NUM_TOKENS)
    assert receiver.token_ids[len(prompt) :] == generate(made.model, prompt)


def test_a_prefix_may_arrive_layer_by_layer_just_before_its_layer_is_read(checkpoint, lab, prompts):
    made = checkpoint("llama2_mha")
    first, second = lab(made.folder), lab(made.folder)
    prompt = prompts(40)
    sender = first.sequence(prompt, max_tokens=1)
    first.run([sender], chunk_len=64, until=1)
    receiver = second.sequence(prompt, max_tokens=1)

    def arrive(layer: int) -> None:
        second.engine.cache.write_blocks(layer, receiver.pages[:4], first.engine.cache.read_blocks(layer, sender.pages[:4]))

    logits = second.step([StepChunk(receiver, 32, 8)], before_layer=arrive)
    assert_close(logits, reference_logits(made.model, prompt, 1))


def test_hooks_are_called_around_every_layer_and_after_finds_the_keys_in_the_pages(checkpoint, lab, prompts):
    ours = lab(checkpoint("qwen2").folder)
    sequence = ours.sequence(prompts(10), max_tokens=1)
    cache, page = ours.engine.cache, sequence.pages[1]
    calls: list[tuple[str, int]] = []
    seen: list[torch.Tensor] = []

    def before(layer: int) -> None:
        calls.append(("before", layer))
        assert not cache.data[layer + 1 :, :, page].any()

    def after(layer: int) -> None:
        calls.append(("after", layer))
        seen.append(cache.read_blocks(layer, [page]).clone())

    ours.step([StepChunk(sequence, 0, 10)], before_layer=before, after_layer=after)
    num_layers = ours.engine.config.num_layers
    assert calls == [(name, layer) for layer in range(num_layers) for name in ("before", "after")]
    for layer, block in enumerate(seen):
        assert torch.equal(block, cache.read_blocks(layer, [page]))
        assert block[0, :, :, :2].abs().amin(dim=-1).all() and not block[0, :, :, 2:].any()


def test_an_error_of_a_hook_ends_the_step(checkpoint, lab, prompts):
    ours = lab(checkpoint("qwen2").folder)
    sequence = ours.sequence(prompts(10), max_tokens=1)

    def fail(layer: int) -> None:
        raise LookupError(f"layer {layer} never came")

    with pytest.raises(LookupError, match="layer 0"):
        ours.engine.forward([StepChunk(sequence, 0, 10)], before_layer=fail)


def test_a_batch_of_decode_tokens_gives_each_the_logits_it_has_alone(checkpoint, lab, prompts):
    made = checkpoint("qwen3_window")
    ours = lab(made.folder)
    sequences = [ours.sequence(prompts(length, seed=length), max_tokens=2) for length in (1, 8, 9, 50)]
    ours.run(sequences, chunk_len=64, until=1)
    logits = ours.step([StepChunk(sequence, sequence.num_tokens - 1, 1) for sequence in sequences])
    for row, sequence in zip(logits, sequences, strict=True):
        assert_close(row[None], reference_logits(made.model, sequence.token_ids[:-1], 1))


def test_nothing_is_launched_where_there_is_no_device_to_run_it_meanwhile(checkpoint, lab, prompts):
    ours = lab(checkpoint("qwen2").folder)
    sequence = ours.sequence(prompts(9), max_tokens=2)
    assert ours.engine.launch([StepChunk(sequence, 8, 1)]) is None
    assert not ours.engine.cache.data.any()


def test_half_precision_stays_close_to_transformers_in_fp32(checkpoint, lab, prompts):
    made = checkpoint("qwen25_tied")
    wanted = reference_logits(made.model, prompts(40), 1)
    for dtype, limit in (("bfloat16", 0.05), ("float16", 0.01)):
        ours = lab(made.folder, dtype=dtype)
        assert ours.engine.cache.data.dtype == getattr(torch, dtype)
        logits = ours.engine.forward([StepChunk(ours.sequence(prompts(40), max_tokens=1), 0, 40)])
        assert logits.dtype == torch.float32
        assert (logits - wanted).norm() / wanted.norm() < limit


def test_dummy_weights_are_random_finite_and_the_same_every_time(checkpoint, lab, prompts, tmp_path):
    folder = tmp_path / "shape-only"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((checkpoint("qwen3").folder / name).read_bytes())
    rows = []
    for _ in range(2):
        ours = lab(folder, load_format="dummy")
        rows.append(ours.engine.forward([StepChunk(ours.sequence(prompts(9), max_tokens=1), 0, 9)])[0])
    assert torch.equal(rows[0], rows[1])
    assert rows[0].isfinite().all() and rows[0].std() > 1e-3


def test_the_context_length_is_the_models_or_what_was_asked_for(checkpoint, lab):
    folder = checkpoint("qwen2").folder
    assert lab(folder).engine.max_model_len == 256
    assert lab(folder, max_model_len=100).engine.max_model_len == 100
    with pytest.raises(ConfigError, match=r"max_model_len is 257.*at most 256"):
        lab(folder, max_model_len=257)


def test_the_capacity_is_rounded_up_to_pages_and_zero_means_twice_the_context(checkpoint, lab):
    folder = checkpoint("qwen2").folder
    assert lab(folder, block_size=48, num_tokens=145).engine.cache.num_pages == 4
    assert lab(folder, block_size=48, num_tokens=0).engine.cache.num_pages == 11


def test_a_missing_gpu_is_named(checkpoint, monkeypatch):
    from halfmoon.engine.engine import Engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no usable GPU"):
        Engine.load(ModelOptions(path=str(checkpoint("qwen2").folder), device="cuda"), kv_capacity_tokens=64, num_threads=1)


def test_an_fp8_cache_costs_a_byte_a_value_and_is_continued_elsewhere_as_it_was_here(checkpoint, lab, prompts):
    made, prompt = checkpoint("qwen3"), prompts(43)
    exact, first, second = lab(made.folder), lab(made.folder, kv_dtype="fp8"), lab(made.folder, kv_dtype="fp8")
    assert first.engine.schema.dtype == "float8_e4m3fn" and first.engine.schema.block_bytes * 4 == exact.engine.schema.block_bytes
    here = first.sequence(prompt, max_tokens=NUM_TOKENS)
    logits = first.run([here], chunk_len=16, until=1)[here.request_id]
    plain = exact.sequence(prompt, max_tokens=NUM_TOKENS)
    wanted = exact.run([plain], chunk_len=16, until=1)[plain.request_id]
    error = (logits[0] - wanted[0]).norm() / wanted[0].norm()
    assert 0 < error < 0.1  # keys and values are within 2^-4 of their own, and so is not what follows from them, quite
    there = second.sequence(prompt, max_tokens=NUM_TOKENS)
    pages = -(-len(prompt) // first.engine.page_size)
    for layer in range(first.engine.config.num_layers):
        second.engine.cache.write_bytes(layer, there.pages[:pages], list(first.engine.cache.read_bytes(layer, here.pages[:pages])))
    there.token_ids.append(here.token_ids[-1])
    there.num_computed_tokens = len(prompt)
    rows = [lab_.run([one], chunk_len=16, until=NUM_TOKENS)[one.request_id] for lab_, one in ((first, here), (second, there))]
    assert there.token_ids == here.token_ids
    assert all(torch.equal(mine, other) for mine, other in zip(*rows, strict=True))
