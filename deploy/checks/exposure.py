"""What of a cluster can be reached or read from other machines, and by whom. `halfmoon serve` refuses that unless it is meant."""

from __future__ import annotations

from ...protocol.address import is_loopback, split_address
from ...protocol.config import ClusterConfig
from ..plan import ClusterPlan
from .finding import Finding

CHECK = "exposure"


def exposure(config: ClusterConfig, plan: ClusterPlan) -> list[Finding]:
    """None for a cluster on loopback, or with TLS and keys."""
    proxy, found = config.proxy, list[Finding]()

    def add(what: str, remedy: str) -> None:
        found.append(Finding(CHECK, "warning", what, remedy))

    if not is_loopback(proxy.host):
        if not proxy.keys_file:
            add(f"whoever reaches {plan.proxy_host} can use the model", "make keys with `halfmoon keys add`, and set proxy.keys_file")
        if not proxy.tls_certificate:
            what = f"clients reach {plan.proxy_host} without TLS, so that prompts, answers and API keys can be read on the way"
            add(what, "make certificates with `halfmoon certs init`, and set proxy.tls_certificate and proxy.tls_key")
    for endpoint in (proxy.kv_events_endpoint, proxy.kv_events_replay_endpoint):
        if endpoint.startswith("tcp://") and not is_loopback(split_address(endpoint.removeprefix("tcp://"))[0]):
            add(f"whoever reaches {endpoint} can read the token ids of prompts", "give a loopback address or ipc://PATH")
    hosts = sorted({placed.node.host for placed in plan.stores if not is_loopback(placed.node.host)})
    if hosts and not config.security.certs:
        what = f"members on {', '.join(hosts)} talk without TLS, so that prompts, KV and the cluster's token can be read on the way"
        add(what, "make certificates with `halfmoon certs init`, and set security.certs")
    return found
