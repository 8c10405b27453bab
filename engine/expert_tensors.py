"""The experts of a checkpoint by one set of names, whichever version of transformers wrote it. No torch.

model.layers.0.mlp.gate.weight  model.layers.0.mlp.experts.7.{gate,up,down}_proj.weight      as they are, Qwen3-MoE's
...block_sparse_moe.gate.weight  ...block_sparse_moe.experts.7.{w1,w3,w2}.weight             Mixtral's, renamed
...mlp.experts.gate_up_proj [num_experts, 2 * width, hidden]  ...mlp.experts.down_proj       all experts in one tensor, cut
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from .tensor_info import TensorInfo

RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
OF_MIXTRAL = re.compile(r"^(.*)\.block_sparse_moe\.(gate|experts\.\d+)(?:\.(w[123]))?\.weight$")
FUSED = re.compile(r"^(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def by_expert(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors that are no expert's stay as they are."""
    return {name: info for stored, found in tensors.items() for name, info in _named(stored, found)}


def _named(stored: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    if of_mixtral := OF_MIXTRAL.match(stored):
        prefix, module, part = of_mixtral.groups()
        name = f"{prefix}.mlp.{module}" + (f".{RENAMED[part]}" if part else "")
        yield f"{name}.weight", info._replace(stored=stored)
    elif (fused := FUSED.match(stored)) and len(info.shape) == 3:
        yield from _cut(stored, info, fused[1], ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",))
    else:
        yield stored, info


def _cut(stored: str, info: TensorInfo, prefix: str, parts: tuple[str, ...]) -> Iterator[tuple[str, TensorInfo]]:
    """Parts have equally many of each expert's rows, which lie one after another in the file."""
    num_experts, num_rows = info.shape[0], info.shape[1] // len(parts)
    num_bytes = info.num_bytes // (num_experts * len(parts)) if math.prod(info.shape) else 0
    for expert in range(num_experts):
        for index, part in enumerate(parts):
            yield (
                f"{prefix}.{expert}.{part}.weight",
                info._replace(
                    shape=(num_rows, info.shape[2]),
                    offset=info.offset + (expert * len(parts) + index) * num_bytes,
                    num_bytes=num_bytes,
                    stored=stored,
                    place=(expert, index * num_rows),
                ),
            )
