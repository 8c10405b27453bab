"""Checkpoints in every published packing, against the plain weights that they mean; tests/quantized_checkpoints.py packs them."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

from halfmoon.engine.linears import DenseLinear, Int4Linear, NarrowLinear
from halfmoon.engine.model_config import ModelConfig
from halfmoon.engine.quantization import Quantization
from halfmoon.engine.quantized_checkpoint import read_matrix
from halfmoon.engine.sequence import StepChunk
from halfmoon.engine.tensor_reader import TensorReader
from halfmoon.engine.weights import load_weights
from halfmoon.protocol.errors import CheckpointError, UnsupportedArchitecture

INT4_FORMS = ("gptq", "gptq_v2", "gptq_sym", "awq", "w4a16", "w4a16_asym", "w4a16_channel")
NARROW_FORMS = ("w8a8_fp8", "w8a8_fp8_static", "w8a8_fp8_block", "w8a8_int8", "fp8", "fp8_block")
CPU = torch.device("cpu")
MATRICES = ("qkv", "o", "gate_up", "down")


def one_matrix(folder, tensors, shape, quantization):
    safetensors.torch.save_file({f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with TensorReader(folder) as reader:
        return read_matrix(reader, "m", shape, quantization)


def word(hexadecimal: int) -> int:
    return hexadecimal - (1 << 32) if hexadecimal >> 31 else hexadecimal


def test_a_word_of_gptq_is_eight_inputs_and_its_zero_points_are_one_less(tmp_path):
    """Output n of 8, inputs 0 to 7: numbers n, n + 1, ... modulo 16; zero points 1 to 8, stored as 0 to 7."""
    rows = [[(n + k) % 16 for k in range(8)] for n in range(8)]
    packed = [word(int("".join(f"{value:x}" for value in reversed(row)), 16)) for row in rows]
    assert packed[0] == 0x76543210
    tensors = {
        "qweight": torch.tensor([packed], dtype=torch.int32),
        "qzeros": torch.tensor([[0x76543210]], dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    made = one_matrix(tmp_path, tensors, (8, 8), Quantization("int4", "gptq", 8, zero_shift=1))
    assert made.dequantized().tolist() == [[0.5 * (rows[n][k] - (n + 1)) for k in range(8)] for n in range(8)]


def test_a_word_of_awq_is_eight_outputs_in_its_order(tmp_path):
    """Each input's outputs are 0 to 7: nibbles 0 2 4 6 1 3 5 7, the lowest first. The zero points are 7 to 0."""
    tensors = {
        "qweight": torch.full((8, 1), 0x75316420, dtype=torch.int32),
        "qzeros": torch.tensor([[0x02461357]], dtype=torch.int32),
        "scales": torch.arange(1, 9).half().view(1, 8),
    }
    made = one_matrix(tmp_path, tensors, (8, 8), Quantization("int4", "awq", 8))
    assert made.dequantized()[:, 3].tolist() == [(n + 1) * (n - (7 - n)) for n in range(8)]


def test_a_word_of_compressed_tensors_is_eight_inputs_of_a_row(tmp_path):
    """Signed numbers -8 to -1 and 7 to 0 are stored as 0 to 7 and 15 to 8; zero points, signed, too, in words along the rows."""
    tensors = {
        "weight_packed": torch.tensor([[0x76543210], [word(0x89ABCDEF)]] * 4, dtype=torch.int32),
        "weight_scale": torch.full((8, 1), 2.0, dtype=torch.bfloat16),
        "weight_zero_point": torch.tensor([[word(0xFEDCBA98)]], dtype=torch.int32),
    }
    made = one_matrix(tmp_path, tensors, (8, 8), Quantization("int4", "compressed-tensors", 8))
    signed = [[k - 8 for k in range(8)], [7 - k for k in range(8)]] * 4
    assert made.dequantized().tolist() == [[2.0 * (signed[n][k] - n) for k in range(8)] for n in range(8)]


def test_blocks_of_128_have_a_scale_each_and_the_last_may_be_short(tmp_path):
    weight = torch.ones(200, 300).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    made = one_matrix(tmp_path, {"weight": weight, "weight_scale_inv": scale}, (200, 300), Quantization("fp8", "fp8", 128, 128))
    plain = made.dequantized()
    for row, column in [(0, 0), (127, 127), (128, 0), (199, 299), (0, 255), (5, 256), (128, 128)]:
        assert plain[row, column] == scale[row // 128, column // 128]


@pytest.mark.parametrize("form", [*INT4_FORMS, *NARROW_FORMS])
def test_every_form_means_the_plain_weights(form, quantized):
    folder = quantized(form)
    config = ModelConfig.from_folder(folder / "quantized")
    made = load_weights(folder / "quantized", config, torch.float32, CPU, quantization=config.quantization)
    plain = load_weights(folder / "plain", ModelConfig.from_folder(folder / "plain"), torch.float32, CPU)
    for layer, wanted in zip(made.layers, plain.layers, strict=True):
        for name in MATRICES:
            ours, theirs = layer.linears()[name], wanted.linears()[name]
            assert isinstance(ours, Int4Linear if form in INT4_FORMS else NarrowLinear)
            torch.testing.assert_close(ours.dequantized(), theirs.weight, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=0)
    assert made.num_bytes < plain.num_bytes


def logits(lab, folder, tokens, **options):
    ours = lab(folder, **options)
    return ours.engine.forward([StepChunk(ours.sequence(tokens, max_tokens=1), 0, len(tokens))])


@pytest.mark.parametrize("form", INT4_FORMS)
def test_an_int4_checkpoint_gives_the_logits_of_its_plain_weights(form, quantized, lab, prompts):
    found, wanted = (logits(lab, quantized(form) / kind, prompts(40)) for kind in ("quantized", "plain"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", NARROW_FORMS)
def test_an_8_bit_checkpoint_gives_them_but_for_the_rounding_of_inputs(form, quantized, lab, prompts):
    folder = quantized(form)
    wanted = logits(lab, folder / "plain", prompts(40))
    torch.testing.assert_close(logits(lab, folder / "quantized", prompts(40), quantization="none"), wanted, rtol=1e-4, atol=1e-4)
    found = logits(lab, folder / "quantized", prompts(40))
    limit = 0.1 if form == "w8a8_int8" else 0.3  # of random layers, which make the most of each rounding; e4m3 has 4 significant bits
    assert 0 < (found - wanted).norm() / wanted.norm() < limit


def test_modules_that_a_checkpoint_leaves_plain_are_plain(quantized, lab, prompts):
    folder = quantized("awq", plain_modules=("down_proj", "gate_proj", "up_proj"))
    config = ModelConfig.from_folder(folder / "quantized")
    linears = load_weights(folder / "quantized", config, torch.float32, CPU, quantization=config.quantization).layers[0].linears()
    assert (
        isinstance(linears["down"], DenseLinear) and isinstance(linears["gate_up"], DenseLinear) and isinstance(linears["qkv"], Int4Linear)
    )
    found, wanted = (logits(lab, folder / kind, prompts(40)) for kind in ("quantized", "plain"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_parts_of_one_product_of_which_some_are_plain_are_named(quantized):
    folder = quantized("awq", plain_modules=("k_proj",)) / "quantized"
    config = ModelConfig.from_folder(folder)
    with pytest.raises(CheckpointError, match=r"q_proj, model\.layers\.0\.self_attn\.k_proj.*only some of them are quantised"):
        load_weights(folder, config, torch.float32, CPU, quantization=config.quantization)


@pytest.fixture
def spoiled(quantized, tmp_path):
    """spoiled(form, change): the error of a copy whose tensors change() has spoiled."""

    def make(form, change) -> str:
        folder = shutil.copytree(quantized(form) / "quantized", tmp_path / "spoiled")
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        config = ModelConfig.from_folder(folder)
        with pytest.raises(CheckpointError) as caught:
            load_weights(folder, config, torch.float32, CPU, quantization=config.quantization)
        return f"{type(caught.value).__name__}: {caught.value.message}"

    return make


def test_columns_ordered_by_activations_are_refused(spoiled):
    name = "model.layers.1.mlp.down_proj.g_idx"
    told = spoiled("gptq", lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    assert told.startswith(UnsupportedArchitecture.__name__) and name in told and "desc_act" in told


def test_a_missing_or_misshapen_scale_is_named(spoiled):
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    assert f"has no tensor {name}" in spoiled("fp8_block", lambda tensors: tensors.pop(name))


def test_misshapen_words_are_named_with_both_shapes(spoiled):
    name = "model.layers.0.self_attn.o_proj.qweight"
    told = spoiled("awq", lambda tensors: tensors.update({name: tensors[name][:8]}))
    assert f"{name} has shape [8, 8]; config.json asks for [96, 8]" in told


def test_asymmetric_int8_weights_are_refused(spoiled):
    name = "model.layers.0.self_attn.q_proj.weight_zero_point"
    told = spoiled("w8a8_int8", lambda tensors: tensors.update({name: torch.ones(96, 1, dtype=torch.int8)}))
    assert "supported are symmetric weights" in told


def test_a_quantised_head_is_read_as_what_it_means(quantized, tmp_path, lab, prompts):
    """compressed-tensors quantises lm_head where its configuration does not ignore it."""
    source = quantized("w8a8_fp8")
    for kind in ("quantized", "plain"):
        folder = shutil.copytree(source / kind, tmp_path / kind)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        head = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        tensors["lm_head.weight"] = head if kind == "quantized" else 0.5 * head.float()
        if kind == "quantized":
            tensors["lm_head.weight_scale"] = torch.full((1,), 0.5)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    found, wanted = (logits(lab, tmp_path / kind, prompts(20), quantization="none") for kind in ("quantized", "plain"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_progress_ends_at_the_bytes_that_there_are(quantized):
    folder, calls = quantized("gptq") / "quantized", []
    config = ModelConfig.from_folder(folder)
    load_weights(folder, config, torch.float32, CPU, lambda *call: calls.append(call), config.quantization)
    size = sum(tensor.nbytes for tensor in safetensors.torch.load_file(folder / "model.safetensors").values())
    assert calls[-1] == ("loading weights", size, size)
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)


def test_the_ignored_names_of_a_configuration_are_not_needed(quantized, tmp_path):
    """The tensors say what is quantised, so a list that names modules in another way changes nothing."""
    folder = shutil.copytree(quantized("awq") / "quantized", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["modules_to_not_convert"] = ["model.layers.0.self_attn"]
    (folder / "config.json").write_text(json.dumps(values))
    config = ModelConfig.from_folder(folder)
    assert isinstance(load_weights(folder, config, torch.float32, CPU, quantization=config.quantization).layers[0].o, Int4Linear)
