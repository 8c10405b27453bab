"""Where Prometheus finds every process of the cluster: http_sd's JSON.

[{"targets": ["10.0.0.2:41873"], "labels": {"worker": "prefill-0", "role": "prefill", "model_name": …, "__meta_halfmoon_node": …}}, …]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..protocol.exporter import Identity
from .members.member import Member


def targets(proxy: Identity, proxy_address: str, members: Iterable[Member], *, has_tls: bool = False) -> list[dict[str, Any]]:
    """The labels are those of the targets' own series, so that `up` has them too; scrape with honor_labels.

    proxy_address: as who asks reaches it. has_tls: the pages have it, and Prometheus is told so.
    """
    scheme = {"__scheme__": "https"} if has_tls else {}
    found = [_target(proxy_address, proxy, scheme)]
    for member in sorted(members, key=lambda member: member.id):
        if member.info.metrics_address:
            identity = Identity(member.id, member.role, proxy.model_name)
            found.append(_target(member.info.metrics_address, identity, {"__meta_halfmoon_node": member.info.node_id} | scheme))
    return found


def _target(address: str, identity: Identity, meta: dict[str, str]) -> dict[str, Any]:
    return {"targets": [address], "labels": identity._asdict() | meta}
