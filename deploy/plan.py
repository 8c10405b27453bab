"""Which process runs on which node.

    node 0   proxy   store-0   prefill-0  prefill-2 …   decode-1 …
    node 1           store-1   prefill-1            …   decode-0 …

Prefill workers take the nodes in turn from the first, decode workers from the last, so that with two nodes and 1P1D each has its own.
Workers with both roles go on where the prefill workers ended. Every node that holds a worker has a store. Without prefill workers the
decode workers compute the prompts themselves.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.address import LOOPBACK, is_loopback, reachable_host
from ..protocol.config import ClusterConfig
from ..protocol.errors import ConfigError, MachineError
from ..protocol.roles import WorkerRole
from .ray_session import RayNode


@dataclass(frozen=True, slots=True)
class Placed:
    member_id: str
    node: RayNode


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    proxy: RayNode
    stores: tuple[Placed, ...]
    prefill: tuple[Placed, ...]
    decode: tuple[Placed, ...]
    both: tuple[Placed, ...]
    device: str  # "cpu" | "cuda", of every worker
    proxy_host: str  # where remote clients reach the proxy, which may listen on more addresses
    control_host: str  # likewise, where members and operators do

    @property
    def workers(self) -> dict[WorkerRole, tuple[Placed, ...]]:
        """Number of workers by the role that they start with."""
        return {"prefill": self.prefill, "decode": self.decode, "both": self.both}


def make_plan(config: ClusterConfig, nodes: Sequence[RayNode]) -> ClusterPlan:
    """Raises ConfigError for a cluster that could not serve or a proxy that other nodes cannot reach, MachineError for too few GPUs."""
    num_prefill, num_decode, num_both = config.prefill.num_workers, config.decode.num_workers, config.both.num_workers
    if num_decode + num_both < 1:
        raise ConfigError(
            f"decode.num_workers is {num_decode} and both.num_workers is {num_both}; a cluster needs at least one worker that decodes"
        )
    if num_prefill + num_both < 1 and config.proxy.local_prefill == "never":
        raise ConfigError(
            f"prefill.num_workers is {num_prefill} and proxy.local_prefill is 'never', so nobody would compute prompts; "
            "set proxy.local_prefill to 'fallback', or have at least one prefill worker"
        )
    num_gpus = count_gpus(nodes)
    device = config.model.device if config.model.device != "auto" else ("cuda" if num_gpus > 0 else "cpu")
    if device == "cuda":
        require_gpus(config, num_gpus, "Ray")

    prefill, decode, both = _on_gpus(config, nodes) if device == "cuda" else _on_cpus(config, nodes)
    used = [node for node in nodes if any(worker.node == node for worker in (*prefill, *decode, *both))]
    proxy_host = reachable_host(config.proxy.host, nodes[0].host)
    control_host = reachable_host(config.proxy.control_host, LOOPBACK if is_loopback(nodes[0].host) else nodes[0].host)
    _require_reachable(control_host, used)
    stores = tuple(Placed(f"store-{i}", node) for i, node in enumerate(used))
    return ClusterPlan(nodes[0], stores, prefill, decode, both, device, proxy_host, control_host)


def count_gpus(nodes: Sequence[RayNode]) -> int:
    return sum(int(node.num_gpus) for node in nodes)


def require_gpus(config: ClusterConfig, num_gpus: int, owner: str) -> None:
    """Raises MachineError that says what to ask for. owner: who has the GPUs."""
    if num_gpus >= config.num_ranks:
        return
    if config.num_ranks > config.num_workers:
        raise MachineError(
            f"{config.num_workers} workers need {config.num_ranks} GPUs with prefill.tensor_parallel {config.prefill.tensor_parallel} and "
            f"decode.tensor_parallel {config.decode.tensor_parallel}, and {owner} has {num_gpus}; ask for fewer workers",
            num_gpus=num_gpus,
        )
    advice = {0: "ask for --device cpu", 1: "ask for --prefill 0 --decode 1, which computes prompts and answers on one GPU"}
    fewer = advice.get(num_gpus, f"ask for {num_gpus} in all, as with --prefill {num_gpus // 2} --decode {num_gpus - num_gpus // 2}")
    or_cpu = ", or for --device cpu" if num_gpus else ""
    raise MachineError(f"{config.num_workers} workers need a GPU each and {owner} has {num_gpus}; {fewer}{or_cpu}", num_gpus=num_gpus)


def couple_on_one_gpu(config: ClusterConfig, num_gpus: int) -> ClusterConfig:
    """The configuration for a user who gave no numbers of workers: with a single GPU, one worker that computes prompts and answers."""
    if num_gpus != 1 or config.model.device == "cpu" or config.proxy.local_prefill == "never":
        return config
    return dataclasses.replace(
        config,
        prefill=dataclasses.replace(config.prefill, num_workers=0),
        decode=dataclasses.replace(config.decode, num_workers=1),
        both=dataclasses.replace(config.both, num_workers=0),
    )


def _on_cpus(config: ClusterConfig, nodes: Sequence[RayNode]) -> tuple[tuple[Placed, ...], ...]:
    """Prefill, decode and both."""
    num_prefill, num_nodes = config.prefill.num_workers, len(nodes)
    prefill = tuple(Placed(f"prefill-{i}", nodes[i % num_nodes]) for i in range(num_prefill))
    decode = tuple(Placed(f"decode-{i}", nodes[-1 - i % num_nodes]) for i in range(config.decode.num_workers))
    both = tuple(Placed(f"both-{i}", nodes[(num_prefill + i) % num_nodes]) for i in range(config.both.num_workers))
    return prefill, decode, both


def _on_gpus(config: ClusterConfig, nodes: Sequence[RayNode]) -> tuple[tuple[Placed, ...], ...]:
    """Prefill, decode and both. The GPUs of a worker are one host's. Raises MachineError where no host has enough of them left."""
    free = {node.node_id: int(node.num_gpus) for node in nodes}

    def place(role: WorkerRole, order: Sequence[RayNode]) -> tuple[Placed, ...]:
        placed: list[Placed] = []
        for number in range(getattr(config, role).num_workers):
            needed = config.ranks_of(role)
            node = next((node for node in order if free[node.node_id] >= needed), None)
            if node is None:
                left = max(free.values(), default=0)
                raise MachineError(
                    f"{role}-{number} needs {needed} GPUs of one host, and none has more than {left} left; ask for fewer workers or less "
                    "tensor_parallel",
                    num_gpus=left,
                )
            free[node.node_id] -= needed
            placed.append(Placed(f"{role}-{number}", node))
        return tuple(placed)

    # the largest first, so that small ones do not take from each host what they need; roles of one size in their order
    roles = sorted(("prefill", "decode", "both"), key=lambda role: -config.ranks_of(role))
    found = {role: place(role, list(reversed(nodes)) if role == "decode" else nodes) for role in roles}
    return found["prefill"], found["decode"], found["both"]


def _require_reachable(control_host: str, nodes: Sequence[RayNode]) -> None:
    """Raises ConfigError. nodes: the ones that hold a worker."""
    away = [node.host for node in nodes if not is_loopback(node.host)]
    if away and is_loopback(control_host):
        raise ConfigError(
            f"members join the proxy at {control_host} and workers run on {away[0]}, from where that is another machine's loopback; "
            "set proxy.control_host to an address of this machine that they reach, or leave it out"
        )


def find_room(nodes: Sequence[RayNode], ranks_on: Sequence[RayNode], device: str, needed: int) -> RayNode | None:
    """The node for one more worker of so many ranks: the one with the fewest, on CUDA among those with as many GPUs free.

    ranks_on: the node of each rank there is. None: no node has room.
    """
    counts = Counter(node.node_id for node in ranks_on)
    with_room = [node for node in nodes if device == "cpu" or node.num_gpus - counts[node.node_id] >= needed]
    return min(reversed(with_room), key=lambda node: counts[node.node_id], default=None)  # the first node has the proxy already
