"""What can be seen of a cluster before Ray starts. `halfmoon serve` ends at the first fault, `halfmoon doctor` lists them all.

model folder ─► weights, tokenizer ─► GPUs, memory, /dev/shm          ports: always
Only a Ray of our own has its workers on this machine: with --address the machine is not judged.
"""

from __future__ import annotations

import functools
from pathlib import Path

from ...engine.gpus import visible_gpus
from ...engine.kv_schema import kv_schema
from ...engine.model_config import ModelConfig
from ...engine.resolve import resolve_device, resolve_max_model_len
from ...protocol.config import ClusterConfig
from ...protocol.memory import available_bytes
from ...protocol.schema import KVSchema
from ..cluster import find_model, require_divisible
from ..plan import require_gpus
from .finding import Check, Finding, ok
from .machine import check_ports, check_shm
from .memory import check_gpu_memory, check_memory
from .model import check_parsers, check_sampling, check_tokenizer, check_weights

ALWAYS_TOLD = ("memory", "GPU memory", "/dev/shm")


class StartChecks:
    """Of one configuration on this machine."""

    def __init__(self, config: ClusterConfig, *, own_ray: bool = True) -> None:
        self._config = config
        self._own_ray = own_ray

    def all(self) -> list[Check]:
        """In the order in which one explains the next."""
        checks = [
            Check("model", self._check_model),
            Check("weights", self._check_weights),
            Check("tokenizer", self._check_tokenizer),
            Check("sampling", lambda: check_sampling(self._model[0], self._config.model)),
            Check("parsers", lambda: check_parsers(self._model[0], self._config.model)),
        ]
        if self._own_ray:
            checks += [Check("devices", self._check_devices), Check("memory", self._check_memory), Check("/dev/shm", self._check_shm)]
        return [Check("ports", lambda: check_ports(self._config.proxy)), *checks]

    @functools.cached_property
    def _model(self) -> tuple[Path, ModelConfig]:
        return find_model(self._config)

    @functools.cached_property
    def _schema(self) -> KVSchema:
        return kv_schema(self._model[1], self._config.model)

    def _check_model(self) -> Finding:
        _, model = self._model
        require_divisible(self._config, model)
        length = resolve_max_model_len(model, self._config.model)
        return ok("model", f"{model.architecture} of {model.num_layers} layers, prompt and answer up to {length} tokens")

    def _check_weights(self) -> Finding:
        return check_weights(*self._model, self._config.model)

    def _check_tokenizer(self) -> Finding:
        return check_tokenizer(*self._model)

    def _check_devices(self) -> Finding:
        gpus, device = visible_gpus(), resolve_device(self._config.model)
        if gpus and device == "cuda":
            require_gpus(self._config, len(gpus), "this machine")
        listed = ", ".join(gpu.name for gpu in gpus) or "no GPU"
        return ok("devices", f"{listed}; workers compute on {'CPU' if device == 'cpu' else 'CUDA'}")

    def _check_memory(self) -> Finding:
        gpus = visible_gpus()
        if resolve_device(self._config.model) == "cuda" and gpus:
            return check_gpu_memory(self._config, *self._model, gpus)
        return check_memory(self._config, *self._model, available_bytes())

    def _check_shm(self) -> Finding:
        return check_shm(self._config, self._schema, resolve_max_model_len(self._model[1], self._config.model))


def require_startable(config: ClusterConfig, *, own_ray: bool) -> list[Finding]:
    """Warnings, and what memory goes where. Raises the first HalfmoonError of what keeps the cluster from serving."""
    found = [check.run() for check in StartChecks(config, own_ray=own_ray).all()]
    return [finding for finding in found if finding.severity != "ok" or finding.check in ALWAYS_TOLD]
