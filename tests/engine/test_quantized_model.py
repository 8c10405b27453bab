"""The trained demo model, quantised at load: what it loses on its own text, and what it weighs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from halfmoon.engine.batch import prepare_batch
from halfmoon.engine.demo_model.measure import examples
from halfmoon.engine.demo_model.rows import Encoder
from halfmoon.engine.engine import Engine
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.resolve import DEMO_FOLDER
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.sampling import SamplingParams

LIMITS = {"fp8": 0.01, "int8": 0.01, "int4": 0.03}


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Conversations about documents that the model has not seen."""
    encoder = Encoder(Tokenizer.from_file(str(Path(DEMO_FOLDER) / "tokenizer.json")))
    return [encoder.conversation(made.conversation)[0] for length in (200, 500) for made in examples(encoder, length, 3, 55)]


def engine(quantization: str) -> Engine:
    options = ModelOptions(device="cpu", dtype="float32", quantization=quantization)  # type: ignore[arg-type]
    return Engine.load(options, kv_capacity_tokens=1024, num_threads=1)


@torch.inference_mode()
def perplexity(made: Engine, texts: list[list[int]]) -> float:
    allocator, losses = PageAllocator(made.cache.num_pages), []
    for token_ids in texts:
        pages = allocator.allocate(-(-len(token_ids) // made.page_size))
        chunk = StepChunk(Sequence("text", token_ids, len(token_ids), SamplingParams(max_tokens=1), pages=pages), 0, len(token_ids))
        hidden, residual = made._decoder.layers(prepare_batch([chunk], made.page_size, made.device, None), made.cache)
        logits = made._decoder.head(hidden, residual)[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(token_ids[1:]), reduction="none"))
        allocator.free(pages)
    return float(torch.cat(losses).mean().exp())


def test_perplexity_is_within_1_percent_in_8_bits_and_3_in_4(texts: list[list[int]]) -> None:
    whole = perplexity(engine("none"), texts)
    assert 2 < whole < 5, "of a model that knows its text"
    worse = {kind: perplexity(engine(kind), texts) / whole - 1 for kind in LIMITS}
    assert {kind: found for kind, found in worse.items() if not abs(found) < LIMITS[kind]} == {}
    assert worse["int4"] > 0.001, "quantised, after all"


def test_layers_take_a_byte_a_number_or_little_more_than_half() -> None:
    sizes = {kind: engine(kind).weight_bytes for kind in ("none", *LIMITS)}
    layers, embedding = 8 * (256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512), 2560 * 256 * 4
    assert sizes["none"] - embedding == pytest.approx(4 * layers, rel=0.01)
    assert sizes["fp8"] - embedding == sizes["int8"] - embedding == pytest.approx(layers, rel=0.03)
    assert sizes["int4"] - embedding == pytest.approx(layers * (0.5 + 5 / 128), rel=0.02)  # a scale of four bytes here, and a zero point
