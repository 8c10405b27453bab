"""Addresses as processes tell them to each other: "host:port", "[host]:port" for IPv6."""

from __future__ import annotations

WILDCARDS = ("0.0.0.0", "::", "")  # every address of a machine; nobody can connect to one from elsewhere # nosec B104

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Reached from its own machine alone."""
    return host.startswith("127.") or host in ("localhost", "::1")


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def reachable_host(listening_host: str, node_host: str) -> str:
    """What others connect to: the node's own address where a process listens on every one."""
    return node_host if listening_host in WILDCARDS else listening_host
