"""What members are started with. No Ray: the processes are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfmoon.deploy.cluster import make_spec
from halfmoon.deploy.ray_session import RayNode
from halfmoon.deploy.supervisor import Member, Supervisor, _crashed
from halfmoon.protocol.config import ClusterConfig, ModelOptions, ProxyConfig


def supervisor(model_folder: Path, proxy_host: str) -> Supervisor:
    config = ClusterConfig(model=ModelOptions(path=str(model_folder)), proxy=ProxyConfig(host=proxy_host))
    return Supervisor(make_spec(config, [RayNode("node-0", "10.1.2.3", 0.0)]))


def started(supervisor: Supervisor, member: Member, address: object) -> None:
    supervisor._members[member.id] = member
    member.address = address


@pytest.mark.parametrize(("host", "bound"), [("0.0.0.0", "0.0.0.0"), ("::", "[::]")])
async def test_members_of_a_proxy_that_listens_on_everything_are_given_its_nodes_address(model_folder: Path, host: str, bound: str) -> None:
    found = supervisor(model_folder, host)
    proxy, store = found._proxy(), found._store(found._spec.plan.stores[0])
    assert proxy.arguments()["config"].host == host, "it listens on everything all the same"
    started(found, proxy, (f"{bound}:8000", f"{bound}:50051", "10.1.2.3:50052", "10.1.2.3:8001"))
    assert (found.http_address, found.grpc_address) == ("10.1.2.3:8000", "10.1.2.3:50051")
    assert (found.control_address, found.metrics_address) == ("10.1.2.3:50052", "10.1.2.3:8001")
    assert store.arguments()["proxy_address"] == "10.1.2.3:50052"
    started(found, store, "10.1.2.3:4711")
    worker_address = found._worker(found._spec.plan.decode[0], "decode").arguments()["worker_address"]
    assert (worker_address.proxy_address, worker_address.store_address, worker_address.host) == (
        "10.1.2.3:50052",
        "10.1.2.3:4711",
        "10.1.2.3",
    )
    again = proxy.arguments()["config"]
    assert (again.host, again.http_port, again.grpc_port) == (host, 8000, 50051), "where clients look for it"
    assert (again.control_host, again.control_port, again.metrics_port) == ("10.1.2.3", 50052, 8001), (
        "and members, which strangers do not reach"
    )


def test_a_process_that_never_served_is_told_with_what_broke_it() -> None:
    """No error of Ray's own: whoever imports Ray here fixes whether this process brings a token to it."""
    error = RuntimeError(
        "The actor died because of an error raised in its creation task, ray::ProxyActor.__init__() (pid=7)\n"
        "  File ...\nModuleNotFoundError: No module named 'fastapi'\n"
    )
    assert "before it served: ModuleNotFoundError: No module named 'fastapi';" in _crashed("proxy", 3, error)
    assert "before it served: RuntimeError;" in _crashed("proxy", 3, RuntimeError())
