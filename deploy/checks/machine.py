"""Checks of this machine: the proxy's ports and address, shared memory, memory, GPUs. Each takes milliseconds."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from ...kvstore.arena_size import ArenaSize, arena_size, free_shm_bytes
from ...protocol.address import LOOPBACK, join_address
from ...protocol.config import PORTS, ClusterConfig, ProxyConfig
from ...protocol.errors import ConfigError, MachineError
from ...protocol.memory import SHM, human_bytes
from ...protocol.schema import KVSchema
from .finding import Finding, ok

MIN_PROMPT_TOKENS = 2048  # or max_model_len where that is less: an arena that the model sizes has to hold as many


def check_ports(proxy: ProxyConfig) -> Finding:
    """Raises MachineError for a port that is taken or not allowed, and for an address that is not this machine's."""
    hosts = {"http_port": proxy.host, "grpc_port": proxy.host}  # the others are on control_host, which is another machine's where not set
    for key in PORTS:
        _require_free(hosts.get(key) or proxy.control_host or LOOPBACK, getattr(proxy, key), key)
    ports = ", ".join(str(getattr(proxy, key)) if getattr(proxy, key) else "any" for key in PORTS)
    return ok("ports", f"{ports} are free on {proxy.host}")


def _require_free(host: str, port: int, key: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # as the proxy listens: a port of a connection that has just ended is free
        socket.create_server((host, port), family=family).close()
    except socket.gaierror as error:
        raise MachineError(f"proxy.host is {host!r}, which names no address: {error.strerror}; give an address of this machine") from error
    except OSError as error:
        address = join_address(host, port)
        if error.errno == errno.EADDRNOTAVAIL:
            raise MachineError(
                f"proxy.host is {host}, which is no address of this machine; give one that is (`ip addr` lists them), or 0.0.0.0",
                key="proxy.host",
            ) from error
        if error.errno == errno.EADDRINUSE:
            raise MachineError(
                f"port {port} is taken on {host}: another process listens on {address} (`ss -ltnp` names it); end it, or choose another "
                f"proxy.{key}, or 0 for any free one",
                key=f"proxy.{key}",
            ) from error
        raise MachineError(
            f"cannot listen on {address}: {error.strerror}; choose another proxy.host or proxy.{key}", key=f"proxy.{key}"
        ) from error


def check_shm(config: ClusterConfig, schema: KVSchema, max_model_len: int, folder: Path = SHM) -> Finding:
    """Whether the arena of a store on this machine fits into shared memory, and what it holds. A cluster whose arena holds less than the
    longest prompt starts all the same: shorter ones work. Raises MachineError, ConfigError."""
    size, free = arena_size(config.store, schema, max_model_len, folder), free_shm_bytes(folder)
    if size.is_set and size.num_bytes > free:
        raise MachineError(
            f"{folder} is too small: store.arena_bytes is {size.num_bytes} and {human_bytes(free)} are free there; lower it, or "
            f"enlarge {folder} (a container's --shm-size)",
            key="store.arena_bytes",
        )
    if size.num_bytes < schema.block_bytes:
        raise ConfigError(
            f"the arena would have {human_bytes(size.num_bytes)} and one KV block takes {human_bytes(schema.block_bytes)}; "
            f"{_larger(size, folder)}",
            key="store.arena_bytes",
        )
    hands_off = config.prefill.num_workers > 0 or config.both.num_workers > 1
    least = min(max_model_len, MIN_PROMPT_TOKENS)
    if hands_off and not size.is_set and size.num_tokens < least:
        raise MachineError(
            f"{folder} has {human_bytes(free)} free, which is too small: half of it holds the KV of {size.num_tokens} tokens, and a prompt "
            f"passes from prefill to decode through it; {_larger(size, folder)}, or serve coupled (--prefill 0)"
        )
    if hands_off and size.num_tokens < max_model_len:
        return Finding("/dev/shm", "fault", arena_too_small(size.num_tokens, max_model_len), _larger(size, folder))
    num_prompts = size.num_tokens / max_model_len
    holds = f"{size.num_tokens} tokens, {num_prompts:.1f} prompts of {max_model_len}"
    return ok("/dev/shm", f"{human_bytes(size.num_bytes)} for the KV store: {holds}")


def arena_too_small(num_tokens: int, max_model_len: int) -> str:
    return (
        f"the KV store's arena is too small for the model: it holds {num_tokens} tokens and a prompt may have {max_model_len}; "
        "one that is longer than the arena is not handed off: a decode worker computes it (proxy.local_prefill), or it is refused"
    )


def _larger(size: ArenaSize, folder: Path) -> str:
    return "raise store.arena_bytes" if size.is_set else f"enlarge {folder} (a container's --shm-size), or lower model.max_model_len"
