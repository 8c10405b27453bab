"""What of a cluster can be reached or read from other machines, and by whom. Said at each start, because nobody else says it."""

from __future__ import annotations

from ...protocol.config import ProxyConfig
from ..plan import ClusterPlan
from .finding import Finding

CHECK = "exposure"


def exposure(proxy: ProxyConfig, plan: ClusterPlan) -> list[Finding]:
    """Warnings; none for a cluster on loopback."""
    found: list[Finding] = []
    if not _is_loopback(proxy.host):
        if not proxy.keys_file:
            what = f"whoever reaches {plan.proxy_host} can use the model: no API key is asked for"
            found.append(Finding(CHECK, "warning", what, "make keys with `halfmoon keys add TENANT`, and set proxy.keys_file"))
        what = f"clients reach {plan.proxy_host} without TLS: prompts, answers and API keys can be read on the way"
        found.append(
            Finding(CHECK, "warning", what, "put a gateway with TLS before it, and keep proxy.host on loopback or in a private network")
        )
    hosts = sorted({placed.node.host for placed in plan.stores if not _is_loopback(placed.node.host)})
    if hosts:
        what = f"members on {', '.join(hosts)} talk without TLS: prompts, KV and the cluster's token can be read on the way"
        found.append(Finding(CHECK, "warning", what, "keep these hosts in a network of their own; docs/security.md says what holds there"))
    return found


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1")
