"""Ray's own listeners are on every interface: nobody without the session's token may get in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from halfmoon.deploy.ray_session import LOOPBACK, ray_session

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]

JOIN = "import ray; ray.init(address={address!r}, log_to_driver=False); print(len(ray.nodes()))"


def joined(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", JOIN.format(address=address)]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60)


def test_a_stranger_without_the_token_is_kept_out_and_one_with_it_is_let_in() -> None:
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    with ray_session() as nodes:
        import ray

        assert [node.host for node in nodes] == [LOOPBACK]
        address = ray.get_runtime_context().gcs_address
        token = os.environ["RAY_AUTH_TOKEN"]
        assert joined(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token).stdout.strip().endswith("1")
        assert joined(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64).returncode != 0
        assert joined(address, RAY_AUTH_MODE="disabled").returncode != 0
    assert {name: value for name, value in os.environ.items() if name.startswith("RAY_")} == before
