"""Builds a worker: both halves on one executor. A role decides how a worker starts and not what it can do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..decode_worker.worker import DecodeHalf
from ..engine.executor import Progress
from ..engine.local_executor import LocalExecutor
from ..engine.ranks.executor import TensorParallelExecutor
from ..engine.resolve import resolve_folder, resolve_name
from ..engine.worker import Worker
from ..engine.worker_life import WorkerAddress
from ..prefill_worker.worker import PrefillHalf
from ..protocol.config import DecodeConfig, ModelOptions, PrefillConfig
from ..protocol.roles import WorkerRole
from ..protocol.timing.step_limits import StepLimits

CPU_PROMPTS = {"prefill": 2, "decode": 8, "both": 8}  # of max_model_len: what a worker's pages hold on CPU, if not configured


def make_worker(
    worker_address: WorkerAddress, *, role: WorkerRole, options: ModelOptions, prefill: PrefillConfig, decode: DecodeConfig
) -> Worker:
    """Pages, ranks, threads and transport are those of the role that it starts with; `both` has decode's."""
    config = prefill if role == "prefill" else decode

    def load(*, name: str, progress: Progress, on_crash: Callable[[BaseException], None]) -> LocalExecutor:
        size = config.tensor_parallel
        make = LocalExecutor.load if size == 1 else partial(TensorParallelExecutor.load_group, size=size)
        return make(
            options,
            kv_capacity_tokens=config.kv_capacity_tokens,
            num_threads=config.num_threads,
            max_decode_batch=decode.max_running,
            cpu_prompts=CPU_PROMPTS[role],
            name=name,
            progress=progress,
            on_crash=on_crash,
        )

    return Worker(
        worker_address,
        role=role,
        model_name=resolve_name(options),
        model_folder=resolve_folder(options),
        load=load,
        transport=config.transport,
        keeps_prefixes=options.prefix_cache_hbm,
        prefill=PrefillHalf(prefill),
        decode=DecodeHalf(decode),
        limits=StepLimits(prefill.max_tokens_per_step, decode.max_prefill_tokens_per_step, decode.tpot_target_s),
    )
