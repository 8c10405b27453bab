"""Whether a worker's weights, pages, graphs and workspace fit into its GPU or this machine, told before anything is loaded, and what would.

MemoryNeed of each role ─► with pages beside it ─► ok, or what fits instead: other weights, fewer pages
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...engine.gpus import Gpu
from ...engine.kv_schema import kv_schema
from ...engine.memory_need import MemoryNeed
from ...engine.model_config import ModelConfig
from ...engine.resolve import resolve_max_model_len
from ...engine.shard import fits
from ...protocol.blocks import div_ceil
from ...protocol.config import ClusterConfig, QuantizationName
from ...protocol.errors import MachineError
from ...protocol.memory import human_bytes
from .finding import Finding, ok

SHARE = 0.9
"""Of the memory that the weights leave, for pages where nobody says how many."""


class WorkerNeed(NamedTuple):
    role: str
    memory: MemoryNeed
    page: int  # bytes of one
    page_tokens: int
    kv_capacity_tokens: int
    """0: what is left."""

    @property
    def set_pages(self) -> int:
        """Bytes of the pages that the configuration asks for."""
        return div_ceil(self.kv_capacity_tokens, self.page_tokens) * self.page

    def taken(self, num_bytes: int) -> int:
        """Tokens of the pages that a worker takes where it has so many bytes; 0: it can't hold them beside its weights."""
        left = num_bytes - self.memory.weights
        if self.kv_capacity_tokens:
            return self.set_pages // self.page * self.page_tokens if self.set_pages <= left else 0
        return max(int(left * SHARE) // self.page, 0) * self.page_tokens

    def room(self, num_bytes: int) -> int:
        """Tokens of the pages that leave what graphs and workspace need, about."""
        return max((num_bytes - self.memory.fixed) // self.page, 0) * self.page_tokens

    def told(self, num_tokens: int) -> str:
        memory, pages = self.memory, div_ceil(num_tokens, self.page_tokens) * self.page
        graphs = f"about {human_bytes(memory.graphs)} of graphs, " if memory.graphs else ""
        return (
            f"{self.role}: {human_bytes(memory.weights)} of weights, {human_bytes(pages)} of pages for {num_tokens} tokens, "
            f"{graphs}about {human_bytes(memory.workspace)} of workspace"
        )


def worker_needs(config: ClusterConfig, folder: Path, model: ModelConfig, *, on_gpu: bool) -> list[WorkerNeed]:
    """Of each role that has workers; on GPUs of one rank, which has a GPU of its own. Raises CheckpointError, ConfigError."""
    schema, length = kv_schema(model, config.model), resolve_max_model_len(model, config.model)
    max_tokens = min(max(config.prefill.max_tokens_per_step, config.decode.max_prefill_tokens_per_step), length)
    memory = MemoryNeed.of_worker(
        folder, model, config.model, max_tokens=max_tokens, max_sequences=config.decode.max_running, has_graphs=on_gpu
    )
    needs = []
    for role, own in (("prefill", config.prefill), ("decode", config.decode), ("both", config.decode)):
        if getattr(config, role).num_workers:
            num_ranks = config.ranks_of(role) if on_gpu else 1
            part = dataclasses.replace(memory, weights=memory.weights // num_ranks)
            needs.append(WorkerNeed(role, part, schema.block_bytes // num_ranks, schema.block_size, own.kv_capacity_tokens))
    return needs


def check_gpu_memory(config: ClusterConfig, folder: Path, model: ModelConfig, gpus: Sequence[Gpu]) -> Finding:
    """Raises MachineError for a worker that the smallest GPU can't hold, with what it could."""
    smallest = min(gpus, key=lambda gpu: gpu.total_bytes)
    free = min(gpu.free_bytes for gpu in gpus)
    needs = worker_needs(config, folder, model, on_gpu=True)
    for need in needs:
        if not need.taken(smallest.total_bytes):
            raise MachineError(f"{_too_large(need, smallest)}; {_instead(config, folder, model, smallest.total_bytes)}")
    listed = ", ".join(f"{gpu.name} with {human_bytes(gpu.free_bytes)} free" for gpu in gpus)
    told = "; ".join(need.told(need.taken(free) or need.kv_capacity_tokens) for need in needs)
    if not all(need.taken(free) for need in needs):
        what = f"{told}; not every GPU has as much free: {listed}"
        return Finding("GPU memory", "warning", what, "end what else uses it (`nvidia-smi` names it)")
    narrow = [need for need in needs if need.taken(free) > need.room(free)]
    if narrow:
        what = f"{told}; beside the pages graphs and workspace may find no room: {listed}"
        remedy = f"set kv_capacity_tokens to at most {min(need.room(free) for need in narrow)}, or another model.quantization"
        return Finding("GPU memory", "warning", what, remedy)
    return ok("GPU memory", f"{told}; {listed}")


def _too_large(need: WorkerNeed, gpu: Gpu) -> str:
    memory = need.memory
    pages = f" and {human_bytes(need.set_pages)} of pages for {need.kv_capacity_tokens} tokens" if need.kv_capacity_tokens else ""
    return (
        f"the model is larger than memory: a {need.role} worker has {human_bytes(memory.weights)} of weights, about "
        f"{human_bytes(memory.graphs + memory.workspace)} of graphs and workspace{pages}, and {gpu.name} has {human_bytes(gpu.total_bytes)}"
    )


def _instead(config: ClusterConfig, folder: Path, model: ModelConfig, num_bytes: int) -> str:
    """What would fit into num_bytes."""
    found: list[str] = []
    for told, changed in _changes(config, model):
        needs = worker_needs(changed, folder, model, on_gpu=True)
        num_tokens = min(min(need.taken(num_bytes), need.room(num_bytes)) for need in needs)
        if num_tokens:
            found.append(f"{told} (pages for {num_tokens} tokens)")
    return f"what would fit: {', '.join(found)}" if found else "take a smaller model or a larger GPU"


def _changes(config: ClusterConfig, model: ModelConfig) -> list[tuple[str, ClusterConfig]]:
    """The pages that fit; with those, other weights or more ranks."""
    prefill, decode = (dataclasses.replace(half, kv_capacity_tokens=0) for half in (config.prefill, config.decode))
    free = dataclasses.replace(config, prefill=prefill, decode=decode)
    kinds: list[QuantizationName] = ["fp8", "int4"] if model.quantization is None else ["auto"]
    kinds = [kind for kind in kinds if kind != config.model.quantization]
    models = {kind: dataclasses.replace(config.model, quantization=kind) for kind in kinds}
    quantized = [(f"model.quantization {kind}", dataclasses.replace(free, model=options)) for kind, options in models.items()]
    ranks = max(config.prefill.tensor_parallel, config.decode.tensor_parallel)
    more = next((size for size in range(ranks + 1, model.num_kv_heads + 1) if fits(model, size)), None)
    if more is not None:
        halves = (dataclasses.replace(half, tensor_parallel=more) for half in (prefill, decode))
        quantized.append((f"tensor_parallel {more}", dataclasses.replace(free, **dict(zip(("prefill", "decode"), halves, strict=True)))))
    return [("kv_capacity_tokens 0", free), *quantized] if free != config else quantized


def check_memory(config: ClusterConfig, folder: Path, model: ModelConfig, available: int) -> Finding:
    """Whether the workers' weights and configured pages fit into this machine's memory, all at once. Raises MachineError."""
    needs = worker_needs(config, folder, model, on_gpu=False)
    counts = {need.role: getattr(config, need.role).num_workers for need in needs}
    needed = sum(counts[need.role] * (need.memory.weights + need.set_pages) for need in needs)
    each = "; ".join(
        f"{need.role}: {human_bytes(need.memory.weights)} of weights"
        + (f", {human_bytes(need.set_pages)} of pages for {need.kv_capacity_tokens} tokens" if need.kv_capacity_tokens else "")
        for need in needs
    )
    if needed > available:
        raise MachineError(
            f"the model is larger than memory: {config.num_workers} workers take {human_bytes(needed)} ({each}, each) and "
            f"{human_bytes(available)} are free; ask for fewer workers (--prefill 0 --decode 1 is the least), quantised weights "
            "(model.quantization int4), or a smaller model"
        )
    return ok("memory", f"{human_bytes(available)} free, {human_bytes(needed)} for {config.num_workers} workers ({each}, each)")
