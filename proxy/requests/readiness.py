"""Whether the cluster can take a request now, and what is missing if it can't."""

from __future__ import annotations

from .router import Router


def missing_parts(router: Router) -> list[str]:
    """One sentence for each missing part; empty if ready. A decode worker alone is enough where it may compute prompts itself."""
    missing = ["the proxy is draining and takes no new requests"] if router.draining else []
    schema = router.schema
    snapshot = router.cluster.snapshot(schema.block_size) if schema is not None else None
    if not router.cluster.store_addresses and not router.allows_local_prefill:
        missing.append("no KV store has joined")
    if (snapshot is None or not snapshot.prefill) and not router.allows_local_prefill:
        missing.append("no prefill worker has joined")
    if snapshot is None or not snapshot.decode:
        missing.append("no decode worker has joined")
    return missing
