"""A whole cluster from one configuration: what `halfmoon serve`, the demo and the end-to-end tests start."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from ..engine.kv_schema import kv_schema
from ..engine.model_config import ModelConfig
from ..engine.resolve import resolve_folder, resolve_max_model_len, resolve_name
from ..engine.shard import Shard
from ..protocol.config import ClusterConfig
from ..protocol.credentials import Credentials
from ..protocol.errors import CheckpointError
from ..protocol.tasks import Tasks
from .plan import make_plan
from .ray_session import RayNode
from .renewal import watched_certificates
from .supervisor import ClusterSpec, Notify, Supervisor


def find_model(config: ClusterConfig) -> tuple[Path, ModelConfig]:
    """The model folder and its model. Needs no Ray, so that a wrong path is reported before anything is started.

    Raises CheckpointError and UnsupportedArchitecture.
    """
    folder = resolve_folder(config.model).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {folder}; --model takes a folder in Hugging Face format")
    return folder, ModelConfig.from_folder(folder)


def require_divisible(config: ClusterConfig, model: ModelConfig) -> None:
    """Raises ConfigError where workers are to divide the model over more processes than it can be divided into."""
    for section, num_workers in (("prefill", config.prefill.num_workers), ("decode", config.decode.num_workers + config.both.num_workers)):
        if num_workers:
            Shard(0, config.ranks_of(section)).require_fits(model, f"{section}.tensor_parallel")


def make_spec(config: ClusterConfig, nodes: Sequence[RayNode]) -> ClusterSpec:
    """Finds everything that can be wrong before a process is started.

    Raises ConfigError and MachineError (plan), and what find_model raises.
    """
    plan = make_plan(config, nodes)
    folder, model = find_model(config)
    # an empty path stays empty: on another machine the demo model is in another folder
    path = str(folder) if config.model.path else ""
    options = dataclasses.replace(config.model, path=path, device=plan.device, name=resolve_name(config.model))
    resolved = dataclasses.replace(config, model=options)
    max_model_len = resolve_max_model_len(model, options)
    require_divisible(config, model)
    return ClusterSpec(config, resolved, plan, folder, kv_schema(model, options), max_model_len)


@asynccontextmanager
async def running_cluster(
    config: ClusterConfig,
    nodes: Sequence[RayNode],
    notify: Notify = lambda member_id, event: None,
    credentials: Credentials | None = None,
) -> AsyncIterator[Supervisor]:
    """Yields once every member serves. Stops them all on the way out, whatever happened. credentials: None: new ones."""
    supervisor = Supervisor(make_spec(config, nodes), notify, credentials=credentials)
    tasks = Tasks("the cluster")
    try:
        await supervisor.start()
        if config.security.certs and supervisor.credentials.tls is not None:
            files = watched_certificates(Path(config.security.certs).expanduser(), supervisor)
            tasks.spawn(files.run(), "looking for new certificates")
        yield supervisor
    finally:
        await tasks.close()
        await supervisor.stop()
