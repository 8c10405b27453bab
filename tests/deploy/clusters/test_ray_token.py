"""Ray's own listeners are on every interface: nobody without the session's token may get in."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from halfmoon.deploy.ray_session import LOOPBACK, RayNode

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

# the client by which ray.init asks who is there; ray.init itself would ask for two minutes before it gives up
JOIN = "from ray._raylet import GcsClient; print(len(GcsClient(address={address!r}).get_all_node_info(timeout=120)))"


def joined(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", JOIN.format(address=address)]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=300)


def test_a_stranger_without_the_token_is_kept_out_and_one_with_it_is_let_in(ray_nodes: list[RayNode]) -> None:
    import ray

    assert [node.host for node in ray_nodes] == [LOOPBACK]
    address = ray.get_runtime_context().gcs_address
    keys = [
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        {"RAY_AUTH_MODE": "disabled"},
    ]
    with ThreadPoolExecutor() as pool:
        friend, liar, stranger = pool.map(lambda environment: joined(address, **environment), keys)
    assert friend.stdout.strip() == str(len(ray.nodes())), friend.stderr
    for refused in (liar, stranger):
        assert refused.returncode != 0 and "AuthenticationError" in refused.stderr, refused
