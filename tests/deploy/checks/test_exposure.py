"""deploy/checks/exposure.py: what can be reached or read from elsewhere is said."""

from __future__ import annotations

import pytest

from halfmoon.deploy.checks.exposure import exposure
from halfmoon.deploy.plan import make_plan
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.config import ClusterConfig, ProxyConfig

KEYS, READ, MEMBERS = "can use the model", "clients reach", "members on"


@pytest.mark.parametrize(
    ("host", "node", "keys_file", "expected"),
    [
        ("127.0.0.1", "127.0.0.2", "", []),
        ("127.0.0.1", "127.0.0.2", "keys.json", []),
        ("127.0.0.1", "10.1.2.3", "", [MEMBERS]),
        ("0.0.0.0", "127.0.0.2", "", [KEYS, READ]),
        ("0.0.0.0", "127.0.0.2", "keys.json", [READ]),
        ("10.1.2.3", "10.1.2.3", "", [KEYS, READ, MEMBERS]),
    ],
)
def test_each_way_in_is_told_and_loopback_is_quiet(host: str, node: str, keys_file: str, expected: list[str]) -> None:
    config = ClusterConfig(proxy=ProxyConfig(host=host, keys_file=keys_file))
    found = exposure(config, make_plan(config, [RayNode("node-0", node, 0.0)]))
    assert [finding.severity for finding in found] == ["warning"] * len(expected)
    for finding, words in zip(found, expected, strict=True):
        assert words in finding.what and finding.remedy


@pytest.mark.parametrize(("endpoint", "is_told"), [("tcp://127.0.0.1:5557", False), ("ipc:///run/events", False), ("tcp://*:5557", True)])
def test_an_endpoint_that_publishes_prompts_to_others_is_told(endpoint: str, is_told: bool) -> None:
    config = ClusterConfig(proxy=ProxyConfig(kv_events_endpoint=endpoint))
    found = exposure(config, make_plan(config, [RayNode("node-0", "127.0.0.2", 0.0)]))
    assert [endpoint in finding.what for finding in found] == [True] * is_told
