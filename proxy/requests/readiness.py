"""Whether the cluster can take a request now, and what is missing if it can't."""

from __future__ import annotations

from .router import Router


def missing_parts(router: Router) -> list[str]:
    """One sentence for each missing part; empty if ready. A worker counts once the store on its node has joined too."""
    missing = ["the proxy is draining and takes no new requests"] if router.draining else []
    schema = router.schema
    snapshot = router.cluster.snapshot(schema.block_size) if schema is not None else None
    if not any(member.role == "store" for member in router.cluster.members.values()):
        missing.append("no KV store has joined")
    if (snapshot is None or not snapshot.prefill) and not router.allows_local_prefill:
        missing.append("no prefill worker has joined")
    if snapshot is None or not snapshot.decode:
        missing.append("no decode worker has joined")
    return missing
