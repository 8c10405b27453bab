from __future__ import annotations

import json
import re

import pytest
import transformers

from halfmoon.engine.model_config import FAMILIES, ModelConfig, RopeScaling
from halfmoon.protocol.errors import CheckpointError, UnsupportedArchitecture

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def read(tmp_path):
    def write_and_read(generation: dict | None = None, **changes) -> ModelConfig:
        values = {key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_folder(tmp_path)

    return write_and_read


def test_a_short_config_takes_the_defaults_of_its_architecture(read):
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.max_position_embeddings) == (4, 16, 10000.0, 2048)
    assert (config.rms_norm_eps, config.qkv_bias, config.qk_norm, config.tie_word_embeddings) == (1e-6, False, False, False)
    assert config.torch_dtype == "float32" and config.layer_windows == (0, 0, 0)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(architecture, read):
    theirs = getattr(transformers, architecture.replace("ForCausalLM", "Config"))()
    sizes = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32}
    ours = read(architectures=[architecture], **sizes)
    assert ours.num_kv_heads == (theirs.num_key_value_heads or theirs.num_attention_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps and ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or 0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ],
)
def test_rope_is_read_as_transformers_5_writes_it_and_as_earlier_ones_did(rope, read):
    config = read(**rope)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_rope_without_scaling_and_with_linear_scaling(read):
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 77.0}).rope_theta == 77.0
    assert read(rope_scaling=None, rope_theta=88).rope_scaling is None
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == RopeScaling("linear", 2.0)


def test_yarn_is_made_for_its_factor_times_the_length_of_training(read):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert read(rope_scaling=yarn, max_position_embeddings=32).max_position_embeddings == 128
    assert read(rope_scaling=yarn, max_position_embeddings=256).max_position_embeddings == 256


def test_dynamic_scaling_begins_where_serving_ends(read):
    config = read(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=32)
    assert config.rope_scaling is None and config.max_position_embeddings == 32


def test_sliding_windows_follow_transformers_rules(read):
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 20}
    assert read(**qwen).layer_windows == (0, 0, 0)
    assert read(**qwen, use_sliding_window=True).layer_windows == (0, 0, 0)  # max_window_layers is 28
    assert read(**qwen, use_sliding_window=True, max_window_layers=2).layer_windows == (0, 0, 20)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert read(**qwen, use_sliding_window=True, max_window_layers=2, layer_types=types).layer_windows == (20, 0, 0)
    mistral = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert read(**mistral, sliding_window=None).sliding_window == 0
    assert read(**mistral, sliding_window=9).layer_windows == (9, 9, 9)
    assert read(**mistral).sliding_window == 4096
    assert read(sliding_window=9, use_sliding_window=True).sliding_window == 0  # a Llama has none


def test_biases_follow_the_architecture(read):
    llama = read(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = read(architectures=["Qwen2ForCausalLM"], num_key_value_heads=2, mlp_bias="absent")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)


def test_eos_comes_from_the_generation_config_first(read):
    assert read(eos_token_id=5).eos_token_ids == frozenset({5})
    assert read(eos_token_id=[5, 6]).eos_token_ids == frozenset({5, 6})
    assert read(eos_token_id=5, generation={"temperature": 1.0}).eos_token_ids == frozenset({5})
    assert read(eos_token_id=5, generation={"eos_token_id": [7, 8]}).eos_token_ids == frozenset({7, 8})


def test_no_eos_at_all_is_an_empty_set(read):
    assert read().eos_token_ids == frozenset()


def test_dtype_is_read_under_its_new_and_its_old_name(read):
    assert read(dtype="bfloat16").torch_dtype == "bfloat16"
    assert read(torch_dtype="float16").torch_dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "is of GPT2LMHeadModel; supported are LlamaForCausalLM, Mistral"),
        ({"architectures": "absent", "model_type": "gpt2"}, "model_type 'gpt2' and no architectures; supported are"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'; supported are"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of the head"),
        (
            {"quantization_config": {"quant_method": "exl3"}},
            "quantized by quant_method 'exl3'; supported are compressed-tensors, fp8, gptq, awq",
        ),
        ({"torch_dtype": "float64"}, "dtype is 'float64'; supported are float32"),
    ],
)
def test_what_the_engine_cannot_run_is_named_beside_what_it_can(changes, message, read):
    with pytest.raises(UnsupportedArchitecture, match=message) as caught:
        read(**changes)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent"}, "hidden_size is None; it must be a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
        ({"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor, high_freq_factor"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(changes, message, read, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "config.json")) + ".*" + message):
        read(**changes)


def test_a_missing_folder_or_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model folder at .*/nowhere"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        ModelConfig.from_folder(tmp_path)
