from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

from halfmoon.engine.checkpoint import list_tensors
from halfmoon.engine.model_config import ModelConfig
from halfmoon.engine.sequence import StepChunk
from halfmoon.engine.weights import load_weights
from halfmoon.protocol.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(checkpoint("qwen2").folder, tmp_path / "model")


def load(folder, progress=None):
    return load_weights(folder, ModelConfig.from_folder(folder), torch.float32, CPU, progress)


def edit(folder, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def test_fused_matrices_are_the_rows_of_their_parts(checkpoint):
    made = checkpoint("qwen2")
    weights = load(made.folder)
    theirs = made.model.model.layers[1]
    attention, mlp = theirs.self_attn, theirs.mlp
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert torch.equal(weights.layers[1].qkv.weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(weights.layers[1].qkv.bias, torch.cat([part.bias for part in parts]))
    assert torch.equal(weights.layers[1].mlp.gate_up.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


def test_tied_embeddings_are_one_tensor_and_untied_ones_two(checkpoint):
    tied, untied = load(checkpoint("qwen3").folder), load(checkpoint("qwen2").folder)
    assert tied.lm_head is tied.embed
    assert not torch.equal(untied.lm_head, untied.embed)


def test_a_sharded_checkpoint_gives_the_same_logits_as_a_single_file(checkpoint, lab, prompts):
    single, sharded = checkpoint("llama3_gqa"), checkpoint("llama3_gqa", max_shard_size="60KB")
    files = list(sharded.folder.glob("*.safetensors"))
    assert len(files) > 3 and not (sharded.folder / "model.safetensors").exists()
    rows = []
    for made in (single, sharded):
        ours = lab(made.folder)
        rows.append(ours.engine.forward([StepChunk(ours.sequence(prompts(20), max_tokens=1), 0, 20)]))
    assert torch.equal(*rows)


def test_progress_counts_every_byte_once(checkpoint):
    made = checkpoint("llama3_gqa", max_shard_size="60KB")
    calls: list[tuple[str, int, int]] = []
    load(made.folder, lambda *call: calls.append(call))
    total = sum(info.num_bytes for info in list_tensors(made.folder).values())
    assert {call[2] for call in calls} == {total} and calls[-1][1] == total
    assert [call[1] for call in calls] == sorted({call[1] for call in calls})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_and_converted(dtype, folder):
    before = load(folder)
    edit(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    after = load(folder)
    assert after.norm.dtype == torch.float32
    assert torch.equal(after.layers[2].qkv.weight, before.layers[2].qkv.weight.to(dtype).float())


def test_a_missing_tensor_is_named(folder):
    edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.1\.self_attn\.k_proj\.bias"):
        load(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[65\]; config\.json asks for \[64\]"):
        load(folder)


def test_an_integer_tensor_is_refused(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is of dtype I32; supported are F32"):
        load(folder)


def test_a_folder_without_safetensors_says_what_is_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors checkpoints are read"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors of 2 files"):
        load(folder)


def test_a_cut_file_is_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=rf"is cut: {len(whole) - 10} bytes of {len(whole)}"):
        load(folder)
    path.write_bytes(whole[:30])
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load(folder)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load(folder)


def test_a_spoiled_header_is_named(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] = ord("!")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="unreadable safetensors header"):
        load(folder)
