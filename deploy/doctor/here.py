"""What can be told of a member that runs on this very machine: whether its process is stopped."""

from __future__ import annotations

import socket
from pathlib import Path

from ...protocol.address import split_address

PROC = Path("/proc")
STOPPED = "T"


def is_here(address: str) -> bool:
    """Whether "host:port" is of this machine."""
    host, _ = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as found:
        try:
            found.bind((host, 0))
        except OSError:
            return False
    return True


def is_stopped(pid: int, address: str) -> bool:
    """Whether the member's process is here and was stopped by a signal. False for one that is gone."""
    if not pid or not is_here(address):
        return False
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == STOPPED
