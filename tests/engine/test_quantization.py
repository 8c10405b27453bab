"""What config.json says of quantised weights, and what model.quantization makes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from halfmoon.engine.model_config import ModelConfig
from halfmoon.engine.quantization import Quantization, read_quantization
from halfmoon.engine.resolve import resolve_quantization
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.errors import CheckpointError, ConfigError, UnsupportedArchitecture

CONFIG = Path("m/config.json")
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP8_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
INT8_WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None, form: str = "float-quantized", **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, **more}


def bits(count: int, kind: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": count, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True, **more}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Quantization("int4", "gptq", 128, zero_shift=1)),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"}, Quantization("int4", "gptq")),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}, Quantization("int4", "awq", 64)),
        ({"quant_method": "fp8"}, Quantization("fp8", "fp8")),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Quantization("fp8", "fp8", 128, 128)),
        (compressed(INT4_WEIGHTS, form="pack-quantized"), Quantization("int4", "compressed-tensors", 128)),
        (compressed(FP8_WEIGHTS, bits(8, "float")), Quantization("fp8", "compressed-tensors")),
        (compressed(INT8_WEIGHTS, bits(8, "int"), "int-quantized"), Quantization("int8", "compressed-tensors")),
    ],
)
def test_each_published_scheme_is_read(values, wanted):
    assert read_quantization(CONFIG, values) == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "by quant_method 'bitsandbytes'; supported are compressed-tensors, fp8, gptq",
        ),
        ({"bits": 4}, "by quant_method None"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "by gptq with bits 3; supported are 4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 100}, "group_size 100; supported are -1, multiples of 8"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*down.*": {}}}, "dynamic .* one scheme for all layers"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "by awq with version 'gemv'; supported are gemm"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]; supported are \[128, 128\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        (compressed(FP8_WEIGHTS), "scheme 'float8 weights by channel, 16-bit activations'; supported are fp8 by channel"),
        (compressed(INT8_WEIGHTS, bits(8, "int", symmetric=False)), "asymmetric int8 activations"),
        (compressed({**INT4_WEIGHTS, "num_bits": 3}, form="pack-quantized"), "int3 weights by group"),
        (
            compressed({**INT4_WEIGHTS, "type": "float"}, bits(4, "float"), "nvfp4-pack-quantized"),
            "float4 weights by group, float4 activations",
        ),
        (compressed(FP8_WEIGHTS, bits(8, "float"), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format 'sparse-24"),
        (compressed(FP8_WEIGHTS, bits(8, "float"), config_groups={}), "config_groups"),
    ],
)
def test_an_unknown_scheme_is_refused_by_its_name(values, message):
    with pytest.raises(UnsupportedArchitecture, match=message) as caught:
        read_quantization(CONFIG, values)
    assert "\n" not in caught.value.message


def test_two_schemes_in_one_checkpoint_are_refused():
    values = compressed(FP8_WEIGHTS, bits(8, "float"))
    values["config_groups"]["group_1"] = {"weights": INT8_WEIGHTS, "input_activations": bits(8, "int")}
    with pytest.raises(UnsupportedArchitecture, match="one scheme for all layers"):
        read_quantization(CONFIG, values)


@pytest.fixture
def resolve(checkpoint):
    config = ModelConfig.from_folder(checkpoint("qwen2").folder)

    def of(wanted: str, found: Quantization | None) -> Quantization | None:
        return resolve_quantization(dataclasses.replace(config, quantization=found), ModelOptions(quantization=wanted))  # type: ignore[arg-type]

    return of


def test_auto_is_what_the_checkpoint_says_and_none_is_nothing(resolve):
    gptq = Quantization("int4", "gptq", 128)
    assert resolve("auto", gptq) == resolve("int4", gptq) == gptq
    assert resolve("auto", None) is None and resolve("none", gptq) is None


def test_a_plain_checkpoint_is_quantised_at_load(resolve):
    found = {kind: resolve(kind, None) for kind in ("fp8", "int8", "int4")}
    assert {kind: (one.kind, one.method, one.group_len) for kind, one in found.items()} == {
        "fp8": ("fp8", "load", 0), "int8": ("int8", "load", 0), "int4": ("int4", "load", 128),
    }  # fmt: skip


def test_a_quantised_checkpoint_is_not_quantised_again(resolve):
    with pytest.raises(
        ConfigError, match=r"model.quantization is fp8 and the checkpoint is int4 in groups of 128 \(gptq\); set it to auto"
    ):
        resolve("fp8", Quantization("int4", "gptq", 128))


def test_a_quantization_config_that_is_no_object_is_an_error(checkpoint, tmp_path):
    import json

    values = json.loads((checkpoint("qwen2").folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": "int4"}))
    with pytest.raises(CheckpointError, match="quantization_config is a str; it must be an object"):
        ModelConfig.from_folder(tmp_path)
