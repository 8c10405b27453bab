"""The sizes that are told before a load, against what is loaded."""

from __future__ import annotations

import pytest

from halfmoon.engine.memory_need import MemoryNeed, weight_bytes
from halfmoon.engine.model_config import ModelConfig
from halfmoon.engine.resolve import DEMO_FOLDER
from halfmoon.protocol.config import ModelOptions

FORMS = ("gptq", "gptq_sym", "awq", "w4a16_asym", "w8a8_fp8", "w8a8_int8", "fp8_block")


def told(folder, **options) -> int:
    return weight_bytes(folder, ModelConfig.from_folder(folder), ModelOptions(path=str(folder), device="cpu", **options))


@pytest.mark.parametrize("kind", ["none", "fp8", "int8", "int4"])
def test_the_demo_models_weights_are_as_large_as_told(kind, lab):
    loaded = lab(DEMO_FOLDER, quantization=kind).engine.weight_bytes
    assert told(DEMO_FOLDER, quantization=kind) == pytest.approx(loaded, rel=0.005)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_checkpoints_weights_are_as_large_as_its_headers_say(form, quantized, lab):
    """These layers are so small that norms, biases and zero points that are all 8 weigh something."""
    folder = quantized(form) / "quantized"
    assert told(folder) == pytest.approx(lab(folder).engine.weight_bytes, rel=0.04)
    assert told(folder, quantization="none") == pytest.approx(lab(folder, quantization="none").engine.weight_bytes, rel=0.04)


def test_graphs_and_workspace_grow_with_what_a_step_may_hold():
    config = ModelConfig.from_folder(DEMO_FOLDER)

    def need(**changes) -> MemoryNeed:
        given = {"max_tokens": 2048, "max_sequences": 64, "has_graphs": True, **changes}
        return MemoryNeed.of_worker(DEMO_FOLDER, config, ModelOptions(device="cpu"), **given)

    assert need().fixed == need().weights + need().workspace + need().graphs
    assert need(has_graphs=False).graphs == 0 and need(max_sequences=256).graphs > need().graphs
    assert need(max_tokens=4096).workspace > need().workspace
    assert need().workspace > 4 * 64 * config.vocab_size, "the logits alone"
