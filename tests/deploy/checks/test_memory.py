"""What workers take of memory, told before they start, and what would fit where they don't."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfmoon.deploy.checks.memory import check_gpu_memory, check_memory, worker_needs
from halfmoon.engine.gpus import Gpu
from halfmoon.engine.model_config import ModelConfig
from halfmoon.protocol.config import BothConfig, ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig
from halfmoon.protocol.errors import MachineError

GB = 10**9
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
Fits = tuple[ClusterConfig, Path, ModelConfig]


@pytest.fixture
def cluster(tmp_path: Path) -> Callable[..., Fits]:
    """cluster(**fields of ModelOptions, pages=0): an 8B on CUDA, a prefill and a decode worker with so many tokens of pages."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def make(pages: int = 0, **options: Any) -> Fits:
        model = ModelOptions(**{"path": str(tmp_path), "device": "cuda", "load_format": "dummy", **options})
        halves = PrefillConfig(kv_capacity_tokens=pages), DecodeConfig(kv_capacity_tokens=pages)
        return ClusterConfig(model=model, prefill=halves[0], decode=halves[1]), tmp_path, ModelConfig.from_folder(tmp_path)

    return make


def gpu(total: float, free: float = 0.0) -> Gpu:
    return Gpu("H100", int(total * GB), int((free or total) * GB))


def test_every_part_is_told_by_role_and_gpu(cluster: Callable[..., Fits]) -> None:
    found = check_gpu_memory(*cluster(), [gpu(80), gpu(80)])
    assert found.severity == "ok"
    for role in ("prefill", "decode"):
        assert f"{role}: 16.1 GB of weights, 57.5 GB of pages for 439040" in found.what
    assert "about 1.1 GB of graphs, about 374.6 MB of workspace" in found.what and found.what.count("H100 with 80.0 GB free") == 2


def test_weights_that_no_gpu_holds_are_refused_with_the_quantisation_that_fits(cluster: Callable[..., Fits]) -> None:
    with pytest.raises(MachineError) as caught:
        check_gpu_memory(*cluster(), [gpu(80), gpu(12)])
    assert "a prefill worker has 16.1 GB of weights, about 1.5 GB of graphs and workspace, and H100 has 12.0 GB" in caught.value.message
    assert (
        "; what would fit: model.quantization fp8 (pages for " in caught.value.message
        and "model.quantization int4 (" in caught.value.message
    )
    with pytest.raises(MachineError, match=r"what would fit: model\.quantization int4 \(pages for \d+ tokens\)$"):
        check_gpu_memory(*cluster(), [gpu(8)])  # half of the weights are 8.03 GB
    with pytest.raises(MachineError, match=r"take a smaller model or a larger GPU$"):
        check_gpu_memory(*cluster(), [gpu(5)])


def test_pages_that_do_not_fit_are_refused_with_those_that_do(cluster: Callable[..., Fits]) -> None:
    with pytest.raises(MachineError) as caught:
        check_gpu_memory(*cluster(pages=1_000_000), [gpu(80)])
    assert "and 131.1 GB of pages for 1000000 tokens" in caught.value.message
    assert "what would fit: kv_capacity_tokens 0 (pages for 439040" in caught.value.message
    assert check_gpu_memory(*cluster(pages=400_000), [gpu(80)]).severity == "ok"


def test_pages_beside_which_graphs_find_no_room_are_a_warning_and_not_refused(cluster: Callable[..., Fits]) -> None:
    """What graphs take is counted and not known, so it refuses nobody."""
    found = check_gpu_memory(*cluster(pages=480_000), [gpu(80)])  # 62.9 GB beside 16.1, which leaves 1 GB
    assert found.severity == "warning" and "graphs and workspace may find no room" in found.what
    (limit,) = re.findall(r"kv_capacity_tokens to at most (\d+)", found.remedy)
    assert check_gpu_memory(*cluster(pages=int(limit)), [gpu(80)]).severity == "ok"
    assert check_gpu_memory(*cluster(pages=int(limit) + 64), [gpu(80)]).severity == "warning"


def test_fewer_tokens_than_a_page_are_a_page(cluster: Callable[..., Fits]) -> None:
    found = check_gpu_memory(*cluster(pages=10), [gpu(80)])
    assert found.severity == "ok" and "8.4 MB of pages for 64 tokens" in found.what


def test_what_is_told_to_fit_fits(cluster: Callable[..., Fits]) -> None:
    with pytest.raises(MachineError) as caught:
        check_gpu_memory(*cluster(), [gpu(12)])
    told = re.findall(r"model\.quantization (\w+) \(pages for (\d+) tokens\)", caught.value.message)
    assert [kind for kind, _ in told] == ["fp8", "int4"]
    for kind, num_tokens in told:
        assert check_gpu_memory(*cluster(quantization=kind, pages=int(num_tokens)), [gpu(12)]).severity == "ok"


def test_a_gpu_that_others_use_is_a_warning(cluster: Callable[..., Fits]) -> None:
    found = check_gpu_memory(*cluster(), [gpu(80, 10)])
    assert found.severity == "warning" and "H100 with 10.0 GB free" in found.what and "nvidia-smi" in found.remedy


def test_a_rank_has_its_part_and_more_ranks_are_among_what_fits(cluster: Callable[..., Fits]) -> None:
    config, folder, model = cluster(quantization="none")
    with pytest.raises(MachineError, match=r"model\.quantization int4 \(.*, tensor_parallel 2 \(pages for (\d+) tokens\)"):
        check_gpu_memory(config, folder, model, [gpu(12), gpu(12)])
    two = dataclasses.replace(config, prefill=PrefillConfig(tensor_parallel=2), decode=DecodeConfig(tensor_parallel=2))
    found = check_gpu_memory(two, folder, model, [gpu(24), gpu(24)])
    assert found.severity == "ok" and "prefill: 8.0 GB of weights, 14.4 GB of pages for 219" in found.what


def test_roles_without_workers_take_nothing(cluster: Callable[..., Fits]) -> None:
    config, folder, model = cluster()
    none = dataclasses.replace(config.prefill, num_workers=0), dataclasses.replace(config.decode, num_workers=0)
    coupled = dataclasses.replace(config, prefill=none[0], decode=none[1], both=BothConfig(num_workers=2))
    assert [need.role for need in worker_needs(coupled, folder, model, on_gpu=True)] == ["both"]


def test_on_cpu_all_workers_share_the_memory(cluster: Callable[..., Fits]) -> None:
    config, folder, model = cluster(device="cpu", dtype="bfloat16")
    assert check_memory(config, folder, model, int(32.2 * GB)).severity == "ok"
    with pytest.raises(MachineError, match=r"2 workers take 32\.1 GB .*16\.1 GB of weights.* and 32\.0 GB are free; .*--decode 1.*int4"):
        check_memory(config, folder, model, 32 * GB)
    with_pages = cluster(device="cpu", dtype="bfloat16", pages=65536)
    with pytest.raises(MachineError, match=r"8\.6 GB of pages for 65536 tokens"):
        check_memory(*with_pages, 40 * GB)
