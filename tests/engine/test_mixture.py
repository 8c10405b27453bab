"""Mixtures of experts: how a folder says so, the layouts of its files, what is counted, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from halfmoon.engine.checkpoint import list_tensors
from halfmoon.engine.fingerprint import model_fingerprint
from halfmoon.engine.memory_need import activation_bytes
from halfmoon.engine.mlp import DenseMLP, MixtureMLP
from halfmoon.engine.model_config import MixtureConfig, ModelConfig
from halfmoon.engine.model_flops import ModelFlops, num_parameters
from halfmoon.engine.resolve import resolve_quantization
from halfmoon.engine.shard import WHOLE, Shard
from halfmoon.engine.weights import DecoderWeights, load_weights
from halfmoon.kernels.experts import route
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.errors import CheckpointError, ConfigError, UnsupportedArchitecture

MODELS = ["sparse_mixtral", "sparse_qwen3_moe"]
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def write_and_read(values: dict[str, Any], **changes: Any) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        return ModelConfig.from_folder(tmp_path)

    return write_and_read


def load(folder: Path, shard: Shard = WHOLE) -> DecoderWeights:
    return load_weights(folder, ModelConfig.from_folder(folder), torch.float32, torch.device("cpu"), shard=shard)


def mixture(weights: DecoderWeights, layer: int) -> MixtureMLP:
    found = weights.layers[layer].mlp
    assert isinstance(found, MixtureMLP)
    return found


def relaid(folder: Path, to: Path) -> Path:
    """The checkpoint as a copy that has all of a layer's experts in one tensor, and no name of Mixtral's own."""
    shutil.copytree(folder, to)
    tensors = safetensors.torch.load_file(to / "model.safetensors")
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    plain, experts = {}, {}
    for name, tensor in tensors.items():
        name = name.replace("block_sparse_moe", "mlp")
        if found := re.match(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault((found[1], names.get(found[3], found[3])), {})[int(found[2])] = tensor
        else:
            plain[name] = tensor
    for prefix in {prefix for prefix, _ in experts}:
        parts = {part: torch.stack([experts[prefix, part][i] for i in range(len(experts[prefix, part]))]) for part in names.values()}
        plain[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
        plain[f"{prefix}.down_proj"] = parts["down_proj"]
    safetensors.torch.save_file(plain, to / "model.safetensors")
    return to


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_those_of_transformers_in_either_layout(name: str, checkpoint: Any, tmp_path: Path) -> None:
    made = checkpoint(name)
    fused = relaid(made.folder, tmp_path / "fused")
    assert not any(".experts.0." in stored for stored in safetensors.torch.load_file(fused / "model.safetensors"))
    for folder in (made.folder, fused):
        ours, theirs = mixture(load(folder), 1), made.model.model.layers[1].mlp
        assert torch.equal(ours.gate_up, theirs.experts.gate_up_proj) and torch.equal(ours.down, theirs.experts.down_proj)
        assert torch.equal(ours.router, theirs.gate.weight)
    assert list_tensors(fused).keys() == list_tensors(made.folder).keys()
    assert model_fingerprint(fused, "auto") == model_fingerprint(made.folder, "auto"), "the same weights by other names"


@pytest.mark.parametrize("name", MODELS)
def test_ranks_have_a_part_of_every_experts_width_and_the_whole_router(name: str, checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint(name).folder
    whole = mixture(load(folder), 0)
    for each in (folder, relaid(folder, tmp_path / "fused")):
        ranks = [mixture(load(each, Shard(rank, 2)), 0) for rank in range(2)]
        gates, ups = zip(*(rank.gate_up.chunk(2, dim=1) for rank in ranks), strict=True)
        assert torch.equal(torch.cat([*gates, *ups], dim=1), whole.gate_up)
        assert torch.equal(torch.cat([rank.down for rank in ranks], dim=2), whole.down)
        assert all(torch.equal(rank.router, whole.router) for rank in ranks)


def test_a_model_of_few_experts_width_is_refused_where_it_can_not_be_divided(read: Any) -> None:
    config = read(QWEN3_30B, moe_intermediate_size=6)
    Shard(0, 2).require_fits(config)
    with pytest.raises(ConfigError, match=r"tensor_parallel is 4, and moe_intermediate_size of the model is 6, .* takes 1, 2$"):
        Shard(0, 4).require_fits(config)


def test_layers_are_dense_where_the_config_says_so(checkpoint: Any, read: Any) -> None:
    layers = load(checkpoint("sparse_qwen3_some_dense").folder).layers
    assert [type(layer.mlp) for layer in layers] == [MixtureMLP, MixtureMLP, DenseMLP]
    assert read(QWEN3_30B, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]).mixture.layers == (1, 5)
    assert read(QWEN3_30B, num_hidden_layers=2, mlp_only_layers=[0, 1]).mixture is None


def test_the_config_is_read_by_either_name_of_the_number_of_experts(read: Any) -> None:
    by_other_name = {key: value for key, value in QWEN3_30B.items() if key != "num_experts"}
    assert read(QWEN3_30B).mixture == MixtureConfig(128, 8, 768, True, tuple(range(48)))
    assert read(by_other_name, num_local_experts=64).mixture.num_experts == 64
    assert read(MIXTRAL_8X7B).mixture == MixtureConfig(8, 2, 14336, True, tuple(range(32)))
    assert read(QWEN3_30B, norm_topk_prob=False).mixture.is_normalized is False
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 9; the layers have 8 experts"):
        read(QWEN3_30B, num_experts=8, num_experts_per_tok=9)


@pytest.mark.parametrize("architecture", ["Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"])
def test_other_mixtures_are_refused_by_their_name(architecture: str, read: Any) -> None:
    with pytest.raises(UnsupportedArchitecture, match=f"is of {architecture}; supported are .*Qwen3MoeForCausalLM"):
        read(QWEN3_30B, architectures=[architecture])


def test_shared_and_quantised_experts_are_refused(read: Any) -> None:
    with pytest.raises(UnsupportedArchitecture, match="shared experts"):
        read(QWEN3_30B, shared_expert_intermediate_size=512)
    with pytest.raises(UnsupportedArchitecture, match="experts are quantised"):
        read(QWEN3_30B, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ConfigError, match=r"model\.quantization is fp8 and the model is a mixture of experts"):
        resolve_quantization(read(QWEN3_30B), ModelOptions(quantization="fp8"))


def test_a_missing_expert_is_named(checkpoint: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("sparse_mixtral").folder, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "layers.1" in name and "experts.3.w2" in name)]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight"):
        load(folder)


def test_memory_counts_every_expert_and_work_those_that_a_token_is_given(read: Any) -> None:
    """By the names of the models: 30B-A3B, and 8x7B, which has 46.7 B parameters of which a token uses 12.9."""
    qwen, mixtral = read(QWEN3_30B), read(MIXTRAL_8X7B)
    assert num_parameters(qwen) == pytest.approx(30.5e9, rel=0.01) and num_parameters(mixtral) == pytest.approx(46.7e9, rel=0.01)
    for config, active in ((qwen, 3.35e9), (mixtral, 12.9e9)):
        flops, embedding = ModelFlops.of_model(config), config.vocab_size * config.hidden_size
        assert (flops.per_token + flops.per_logits) / 2 + embedding == pytest.approx(active, rel=0.02)
    dense = dataclasses.replace(qwen, mixture=None)
    assert activation_bytes(qwen, 2) == 2 * (4 * 2048 + 8 * (768 + 2048)) > activation_bytes(dense, 2)


def test_weights_counted_are_those_that_are_held_but_for_norms(checkpoint: Any) -> None:
    folder = checkpoint("sparse_qwen3_some_dense").folder
    tensors = load(folder).tensors()
    held = sum({tensor.data_ptr(): tensor.numel() for tensor in tensors if tensor.dim() > 1}.values())
    assert held == num_parameters(ModelConfig.from_folder(folder))


@pytest.mark.parametrize(("num_chosen", "num_hit"), [(1, 1), (2, 2), (4, 4)])
def test_a_batch_whose_tokens_all_go_to_the_same_experts_is_as_in_transformers(num_chosen: int, num_hit: int) -> None:
    """To one only, to two of four, to all: the others get none."""
    torch.manual_seed(num_chosen)
    config = transformers.MixtralConfig(hidden_size=24, intermediate_size=20, num_local_experts=4, num_experts_per_tok=num_chosen)
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(17, 24)
    x[:, 0] = 1.0
    with torch.no_grad():
        block.gate.weight[:, 0] = torch.tensor([0.0, 20.0, 0.0, 40.0])  # the last and then the second, whatever the token
        parameters = dict(block.named_parameters())
        ours = MixtureMLP(
            *(parameters[name] for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")),
            num_experts_per_token=num_chosen,
            is_normalized=True,
        )
        _, chosen = route(x @ ours.router.T, num_chosen, True)
        assert len(chosen.unique()) == num_hit
        torch.testing.assert_close(ours(x), block(x[None])[0], rtol=1e-5, atol=1e-5)
        assert ours(x[:0]).shape == (0, 24)
