from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import get_args

import pytest
import safetensors.torch

from halfmoon.engine.fingerprint import model_fingerprint
from halfmoon.engine.kv_schema import kv_schema
from halfmoon.engine.model_config import ModelConfig
from halfmoon.protocol.config import ModelOptions, QuantizationName
from halfmoon.protocol.schema import KVSchema


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("qwen3").folder, tmp_path / "model")


def edit_config(folder, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def edit_tensor(folder, name, index) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[name].view(-1)[index] += 1.0
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_copy_has_the_same_fingerprint(checkpoint, folder):
    original = model_fingerprint(checkpoint("qwen3").folder, "auto")
    assert model_fingerprint(folder, "auto") == original and len(bytes.fromhex(original)) == 16


def test_what_says_when_to_stop_does_not_change_it(folder):
    before = model_fingerprint(folder, "auto")
    edit_config(folder, eos_token_id=[1, 2, 3], bos_token_id=9)
    (folder / "generation_config.json").write_text('{"eos_token_id": 77}')
    assert model_fingerprint(folder, "auto") == before


@pytest.mark.parametrize("change", [{"rms_norm_eps": 0.5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}])
def test_a_configuration_that_computes_something_else_changes_it(change, folder):
    before = model_fingerprint(folder, "auto"), model_fingerprint(folder, "dummy")
    edit_config(folder, **change)
    after = model_fingerprint(folder, "auto"), model_fingerprint(folder, "dummy")
    assert after[0] != before[0] and after[1] != before[1]


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_changed_number_at_a_tensors_ends_changes_it(name, index, folder):
    before = model_fingerprint(folder, "auto")
    edit_tensor(folder, name, index)
    assert model_fingerprint(folder, "auto") != before


def test_every_number_of_a_small_tensor_counts(folder):
    before = model_fingerprint(folder, "auto")
    edit_tensor(folder, "model.norm.weight", 33)
    assert model_fingerprint(folder, "auto") != before


def test_dummy_weights_have_a_fingerprint_of_their_own_and_need_no_tensors(folder):
    before = model_fingerprint(folder, "dummy")
    assert before != model_fingerprint(folder, "auto")
    (folder / "model.safetensors").unlink()
    assert model_fingerprint(folder, "dummy") == before


def test_the_schema_is_that_of_config_and_options(checkpoint):
    folder = checkpoint("qwen3").folder
    options = ModelOptions(path=str(folder), device="cpu", block_size=16)
    wanted = KVSchema(model_fingerprint(folder, "auto"), "float32", 3, 2, 40, 16)
    assert kv_schema(ModelConfig.from_folder(folder), options) == wanted


def test_dtype_auto_is_float32_on_cpu_and_the_checkpoints_on_cuda(checkpoint, folder):
    edit_config(folder, dtype="bfloat16")
    config = ModelConfig.from_folder(folder)
    dtypes = {
        (device, dtype): kv_schema(config, ModelOptions(path=str(folder), device=device, dtype=dtype)).dtype
        for device in ("cpu", "cuda")
        for dtype in ("auto", "float16")
    }
    assert dtypes == {
        ("cpu", "auto"): "float32",
        ("cuda", "auto"): "bfloat16",
        ("cpu", "float16"): "float16",
        ("cuda", "float16"): "float16",
    }


def test_schema_and_configuration_are_read_without_torch_or_ray(checkpoint):
    code = (
        "import sys\nfrom pathlib import Path\nfrom halfmoon.engine.kv_schema import kv_schema\n"
        "from halfmoon.engine.model_config import ModelConfig\nfrom halfmoon.protocol.config import ModelOptions, QuantizationName\n"
        f"folder = {str(checkpoint('qwen3').folder)!r}\n"
        "print(kv_schema(ModelConfig.from_folder(Path(folder)), ModelOptions(path=folder)).model_fingerprint)\n"
        "assert not {'torch', 'ray', 'triton', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == model_fingerprint(checkpoint("qwen3").folder, "auto")


def test_workers_that_quantise_differently_share_no_blocks(folder):
    config = ModelConfig.from_folder(folder)
    schemas = {
        kind: kv_schema(config, ModelOptions(path=str(folder), device="cpu", quantization=kind)) for kind in get_args(QuantizationName)
    }
    assert schemas.pop("auto") == schemas["none"], "the checkpoint is a plain one"
    assert len({schema.model_fingerprint for schema in schemas.values()}) == 4


def test_one_checkpoint_read_as_two_schemes_has_two_fingerprints(quantized, tmp_path):
    """The same bytes: GPTQ's formats differ in what a zero point means, and none is the plain weights."""
    folder = shutil.copytree(quantized("gptq") / "quantized", tmp_path / "gptq")

    def found(quantization="auto"):
        options = ModelOptions(path=str(folder), device="cpu", quantization=quantization)
        return kv_schema(ModelConfig.from_folder(folder), options).model_fingerprint

    first, plain = found(), found("none")
    values = json.loads((folder / "config.json").read_text())
    other = {**values, "quantization_config": {**values["quantization_config"], "checkpoint_format": "gptq_v2"}}
    (folder / "config.json").write_text(json.dumps(other))
    assert len({first, plain, found()}) == 3
