"""A Ray to run on: one of our own, on loopback only, or one that is already there.

Ray places and watches the processes. No token and no KV byte passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..protocol.errors import ConfigError, MachineError
from .ray_leftovers import ended_if_it_fails

logger = logging.getLogger(__name__)

# Ray rewrites 127.0.0.1 to the machine's outward address, but leaves 127.0.0.2 alone
LOOPBACK = "127.0.0.2"
CONNECT_TIMEOUT_S = 5.0
HOSTS_EVERY_S = 1.0  # Ray tells nobody of a host that joins
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "PYTHONSAFEPATH": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}
OWN_ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_gcs_server_port_wait_time_s": "120"}
"""Of a Ray that is ours, besides ENVIRONMENT; ray_environment says why."""
OBJECT_STORE_BYTES = 80 * 2**20  # nothing of ours goes through it


@dataclass(frozen=True, slots=True)
class RayNode:
    node_id: str
    host: str
    num_gpus: float


@contextmanager
def ray_session(address: str | None = None) -> Iterator[list[RayNode]]:
    """Joins the Ray at address ("auto", "host:port"), or starts one. Yields its live nodes, this one first.

    Raises ConfigError if no Ray answers at address, MachineError if one of our own does not start.
    """
    with ray_environment(address):
        # Ray puts the driver's folder on its workers' path: in a checkout they would find kernels/ and proxy/ as top-level packages
        with contextlib.chdir(tempfile.gettempdir()):
            _init(address)
        import ray

        try:
            yield live_nodes()
        finally:
            ray.shutdown()


@functools.cache
def _token() -> str:
    """The same for the whole process, because Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def ray_environment(address: str | None = None) -> Iterator[None]:
    """The environment of Ray and the processes that it starts. What the user has set stays.

    A Ray of our own starts workers at normal niceness and not at its 15, at which on a shared CPU every token would wait for all else.
    Ray forks to start its processes. gRPC's fork handlers are off, because they sometimes crash the child while other threads use gRPC.
    Ray's own listeners are on every interface, whatever address a node is given, so only a token keeps strangers out.
    """
    wanted = ENVIRONMENT if address is not None else {**ENVIRONMENT, **OWN_ENVIRONMENT, "RAY_AUTH_TOKEN": _token()}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _init(address: str | None) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        _start_local(options | {"_node_ip_address": LOOPBACK, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES})
        return
    try:
        if address != "auto":
            _require_listener(address)
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray to join at {address!r}: {error}; start one with `ray start --head`, or leave --address out") from error


def _start_local(options: dict[str, Any]) -> None:
    """Ray gives its processes 30 s, whatever else the machine does; a second try often finds it calmer. Raises MachineError."""
    import ray

    for is_last in (False, True):
        try:
            with ended_if_it_fails():
                ray.init(address="local", **options)
            return
        except Exception as error:  # Ray raises plain Exception for a process that did not come up
            ray.shutdown()
            told = " ".join(str(error).split())
            if is_last:
                raise MachineError(
                    f"Ray did not start, twice: {told}; wait until this machine is less busy, or run `ray start --head` and join that with "
                    "--address auto"
                ) from error
            logger.warning("Ray did not start (%s); trying once more", told)


def _require_listener(address: str) -> None:
    """Checked first, because ray.init tries for more than a minute before it says that nobody is there."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def live_nodes() -> list[RayNode]:
    """Of the Ray that this process is in, this node first. Asks Ray's head."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = [
        RayNode(node["NodeID"], node["NodeManagerAddress"], node["Resources"].get("GPU", 0.0)) for node in ray.nodes() if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.node_id != here, node.node_id))


async def hosts_joined(wanted: int, say: Callable[[str], None], addresses: Collection[str] = ()) -> None:
    """Returns when Ray has that many. say: takes a line for the user, when there is one more or one less.

    addresses: of the hosts that count, where they are known: Ray takes half a minute to see that one of the others has lost its power.
    """
    seen = 0
    while (found := await asyncio.to_thread(_count_hosts, addresses)) < wanted:
        if found != seen:
            say(f"{found} of {wanted} hosts have joined Ray")
            seen = found
        await asyncio.sleep(HOSTS_EVERY_S)


def _count_hosts(addresses: Collection[str]) -> int:
    hosts = [node.host for node in live_nodes()]
    return len(hosts) if not addresses else len(set(hosts).intersection(addresses))
