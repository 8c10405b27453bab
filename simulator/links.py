"""A node's network, each way a queue of bytes: what leaves and what enters shares it, first come first served.

produced during [start, end] ──► egress of the source ──► ingress of the target ──► there
"""

from __future__ import annotations


class Link:
    """One direction of one node."""

    __slots__ = ("busy_until_s", "bytes_per_s", "num_bytes")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.busy_until_s = 0.0
        self.num_bytes = 0  # carried or queued, ever


def send(source: Link, target: Link, num_bytes: int, start_s: float, end_s: float, num_layers: int = 1) -> float:
    """When the last byte has arrived, of bytes that are produced layer by layer between start_s and end_s.

    Layers but the last travel under the computation that makes the next ones, as far as both links have room; the last one leaves
    at end_s at the earliest.
    """
    if num_bytes == 0:
        return end_s
    arrived_s = end_s + num_bytes / num_layers / min(source.bytes_per_s, target.bytes_per_s)
    for link in (source, target):
        link.busy_until_s = max(link.busy_until_s, start_s) + num_bytes / link.bytes_per_s
        link.num_bytes += num_bytes
        arrived_s = max(arrived_s, link.busy_until_s)
    return arrived_s
