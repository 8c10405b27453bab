"""How Ray starts, and whose hosts count. Who gets into it: clusters/test_ray_token.py."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest

from halfmoon.deploy.launch.head import addresses_of
from halfmoon.deploy.ray_session import RayNode, hosts_joined, ray_environment, ray_session
from halfmoon.protocol.errors import MachineError

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

TIMED_OUT = "The current node timed out during startup. This\ncould happen because some of the raylet failed to startup."


def test_what_ray_reads_is_set_for_as_long_as_it_runs_and_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    before = dict(os.environ)
    with ray_environment():
        assert os.environ["RAY_AUTH_MODE"] == "disabled" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert dict(os.environ) == before


@pytest.fixture
def slow_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Ray that fails to start as often as there are entries; each start takes one."""
    import ray

    failures: list[str] = []

    def init(**options: object) -> None:
        if failures:
            raise Exception(failures.pop())

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("halfmoon.deploy.ray_session.live_nodes", list)
    return failures


def test_a_ray_that_is_too_slow_is_one_line_and_one_more_try(slow_ray: list[str], caplog: pytest.LogCaptureFixture) -> None:
    slow_ray.append(TIMED_OUT)
    with caplog.at_level(logging.WARNING), ray_session() as nodes:
        assert nodes == []
    (line,) = (record.getMessage() for record in caplog.records if "ray_session" in record.name)
    assert "\n" not in line and "timed out during startup" in line and "once more" in line


def test_a_ray_that_does_not_start_twice_is_one_typed_line(slow_ray: list[str]) -> None:
    slow_ray += [TIMED_OUT] * 3
    with pytest.raises(
        MachineError, match=r"^Ray did not start, twice: The current node timed out during startup\. This could.*--address auto"
    ):
        with ray_session():
            pass
    assert len(slow_ray) == 1


FAIL_LATE = """
from halfmoon.deploy.ray_leftovers import _of_ray
from halfmoon.deploy.ray_session import ray_environment, ray_session
from halfmoon.protocol.errors import MachineError

seen = []

def get_node(*_):
    seen.append(len(_of_ray()))
    raise Exception("it was too slow")

with ray_environment():
    import ray._private.services

    ray._private.services.get_node = get_node
    try:
        with ray_session():
            pass
    except MachineError:
        print(seen, len(_of_ray()))
"""


def test_a_ray_that_did_not_start_leaves_no_process_behind() -> None:
    """Two tries, each of which fails when Ray's processes run: none of the first is there in the second, and none afterwards."""
    done = subprocess.run([sys.executable, "-c", FAIL_LATE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (seen, left) = done.stdout.strip().split("] ")
    first, second = json.loads(f"{seen}]")
    assert first == second >= 2 and left == "0", "gcs_server and raylet at least"


async def test_a_host_that_ray_still_takes_for_alive_does_not_stand_in_for_one_that_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[str] = ["10.0.0.1", "10.0.0.2"]
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        hosts.append("10.0.0.3")

    monkeypatch.setattr("halfmoon.deploy.ray_session.live_nodes", lambda: [RayNode(host, host, 0.0) for host in hosts])
    monkeypatch.setattr("halfmoon.deploy.ray_session.HOSTS_EVERY_S", 0.0)
    await hosts_joined(2, tell)
    assert told == []
    await hosts_joined(2, tell, addresses_of({"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.3"]}))
    assert told == ["1 of 2 hosts have joined Ray"]
    assert addresses_of({"type": "aws", "region": "eu-west-1"}) == []
