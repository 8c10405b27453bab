"""The ports that this process listens on. `from halfmoon.tests.listening import listening_sockets`"""

from __future__ import annotations

import os
from pathlib import Path

LISTEN = "0A"  # the state, as in /proc/net/tcp


def listening_sockets() -> set[str]:
    """By their inodes, TCP over IPv4 and IPv6."""
    inodes = set[str]()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                inodes.add(fields[9])
    return inodes & {_inode(entry.path) for entry in os.scandir("/proc/self/fd")}


def _inode(descriptor: str) -> str:
    """Of a socket; "" for what is none, or was closed meanwhile."""
    try:
        found = os.readlink(descriptor)
    except OSError:
        return ""
    return found.removeprefix("socket:[").removesuffix("]") if found.startswith("socket:[") else ""
