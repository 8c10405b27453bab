from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.deploy.plan import couple_on_one_gpu, find_room, make_plan
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.config import BothConfig, ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig
from halfmoon.protocol.errors import ConfigError, MachineError


def nodes(count: int, num_gpus: float = 0.0, host: str = "127.0.0.2") -> list[RayNode]:
    return [RayNode(f"node-{i}", host, num_gpus) for i in range(count)]


def config(num_prefill: int, num_decode: int, num_both: int = 0, **model: str) -> ClusterConfig:
    return ClusterConfig(
        model=ModelOptions(**model),  # type: ignore[arg-type]
        prefill=PrefillConfig(num_workers=num_prefill),
        decode=DecodeConfig(num_workers=num_decode),
        both=BothConfig(num_workers=num_both),
    )


def test_one_prefill_and_one_decode_on_two_nodes_each_have_their_own() -> None:
    plan = make_plan(config(1, 1), nodes(2))
    assert plan.prefill[0].node.node_id == "node-0"
    assert plan.decode[0].node.node_id == "node-1"
    assert [store.node.node_id for store in plan.stores] == ["node-0", "node-1"]


@given(st.integers(1, 5), st.integers(0, 8), st.integers(1, 8))
def test_workers_are_spread_evenly_and_every_node_with_a_worker_has_one_store(num_nodes: int, num_prefill: int, num_decode: int) -> None:
    plan = make_plan(config(num_prefill, num_decode), nodes(num_nodes))
    assert (len(plan.prefill), len(plan.decode)) == (num_prefill, num_decode)
    for workers in (plan.prefill, plan.decode):
        counts = [sum(worker.node == node for worker in workers) for node in nodes(num_nodes)]
        assert max(counts) - min(counts) <= 1
    used = {worker.node.node_id for worker in (*plan.prefill, *plan.decode)}
    assert sorted(store.node.node_id for store in plan.stores) == sorted(used)
    assert all(any(store.node == worker.node for store in plan.stores) for worker in plan.decode)


@given(st.integers(1, 5), st.integers(1, 8))
def test_workers_of_both_roles_are_a_whole_cluster_and_go_round_the_nodes(num_nodes: int, num_both: int) -> None:
    never = dataclasses.replace(config(0, 0, num_both), proxy=ProxyConfig(local_prefill="never"))
    for found in (make_plan(config(0, 0, num_both), nodes(num_nodes)), make_plan(never, nodes(num_nodes))):
        assert (found.prefill, found.decode) == ((), ()) and [worker.member_id for worker in found.both] == [
            f"both-{i}" for i in range(num_both)
        ]
        counts = [sum(worker.node == node for worker in found.both) for node in nodes(num_nodes)]
        assert max(counts) - min(counts) <= 1 and len(found.stores) == min(num_nodes, num_both)


def test_workers_of_both_roles_need_gpus_too() -> None:
    with pytest.raises(MachineError, match="4 workers need a GPU each and Ray has 3"):
        make_plan(config(1, 1, 2, device="cuda"), nodes(1, num_gpus=3))
    plan = make_plan(config(1, 1, 2), nodes(2, num_gpus=2))
    placed = [worker.node.node_id for worker in (*plan.prefill, *plan.decode, *plan.both)]
    assert plan.device == "cuda" and placed.count("node-0") == placed.count("node-1") == 2


@given(st.integers(1, 4), st.integers(1, 4))
def test_no_gpu_gets_two_workers(num_prefill: int, num_decode: int) -> None:
    total = num_prefill + num_decode
    plan = make_plan(config(num_prefill, num_decode), nodes((total + 1) // 2, num_gpus=2))
    assert plan.device == "cuda"
    on = [worker.node.node_id for worker in (*plan.prefill, *plan.decode)]
    assert all(on.count(node_id) <= 2 for node_id in on)


def divided(num_prefill: int, num_decode: int, prefill_ranks: int, decode_ranks: int) -> ClusterConfig:
    made = config(num_prefill, num_decode, device="cuda")
    return dataclasses.replace(
        made,
        prefill=dataclasses.replace(made.prefill, tensor_parallel=prefill_ranks),
        decode=dataclasses.replace(made.decode, tensor_parallel=decode_ranks),
    )


@given(st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_every_workers_ranks_are_on_one_host_and_no_gpu_has_two(num_prefill: int, num_decode: int, mine: int, yours: int) -> None:
    hosts = nodes(num_prefill + num_decode, num_gpus=4)
    plan = make_plan(divided(num_prefill, num_decode, mine, yours), hosts)
    assert (len(plan.prefill), len(plan.decode)) == (num_prefill, num_decode)
    for host in hosts:
        taken = mine * sum(worker.node == host for worker in plan.prefill) + yours * sum(worker.node == host for worker in plan.decode)
        assert taken <= host.num_gpus
    assert find_room(hosts, [worker.node for worker in plan.decode for _ in range(yours)], "cuda", 4) not in [
        one.node for one in plan.decode
    ]


def test_workers_that_no_host_holds_are_refused_with_what_is_left() -> None:
    with pytest.raises(
        MachineError, match=r"2 workers need 6 GPUs with prefill\.tensor_parallel 2 and decode\.tensor_parallel 4, and Ray has 4"
    ):
        make_plan(divided(1, 1, 2, 4), nodes(1, num_gpus=4))
    with pytest.raises(MachineError, match="decode-0 needs 4 GPUs of one host, and none has more than 3 left"):
        make_plan(divided(1, 1, 2, 4), nodes(2, num_gpus=3))
    assert [one.node.node_id for one in make_plan(divided(2, 1, 1, 2), nodes(2, num_gpus=2)).prefill] == ["node-0", "node-0"]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_too_few_gpus_never_serve_on_the_cpu_and_the_error_says_what_to_ask_for(device: str) -> None:
    with pytest.raises(MachineError, match=r"4 workers need a GPU each and Ray has 1; ask for --prefill 0 --decode 1.*--device cpu"):
        make_plan(config(2, 2, device=device), nodes(1, num_gpus=1))
    with pytest.raises(MachineError, match="4 workers need a GPU each and Ray has 3; ask for 3 in all, as with --prefill 1 --decode 2"):
        make_plan(config(2, 2, device=device), nodes(3, num_gpus=1))


def test_a_ray_without_gpus_serves_on_the_cpu_unless_cuda_was_asked_for() -> None:
    assert make_plan(config(2, 2), nodes(1)).device == "cpu"
    assert make_plan(config(2, 2, device="cpu"), nodes(1, num_gpus=1)).device == "cpu"
    with pytest.raises(MachineError, match="4 workers need a GPU each and Ray has 0; ask for --device cpu"):
        make_plan(config(2, 2, device="cuda"), nodes(1))


def test_one_gpu_is_coupled_by_itself() -> None:
    coupled = couple_on_one_gpu(config(1, 1), 1)
    assert (coupled.prefill.num_workers, coupled.decode.num_workers, coupled.both.num_workers) == (0, 1, 0)
    assert make_plan(coupled, nodes(1, num_gpus=1)).device == "cuda"
    for num_gpus, device in ((0, "auto"), (2, "auto"), (1, "cpu")):
        assert couple_on_one_gpu(config(1, 1, device=device), num_gpus) == config(1, 1, device=device)


def test_a_cluster_without_a_decode_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"decode\.num_workers is 0"):
        make_plan(config(1, 0), nodes(1))


def test_a_cluster_without_a_prefill_worker_is_refused_only_where_decode_workers_may_not_prefill() -> None:
    plan = make_plan(config(0, 2), nodes(2))
    assert plan.prefill == () and [worker.node.node_id for worker in plan.decode] == ["node-1", "node-0"]
    forbidden = dataclasses.replace(config(0, 2), proxy=ProxyConfig(local_prefill="never"))
    with pytest.raises(ConfigError, match=r"prefill\.num_workers is 0 and proxy\.local_prefill is 'never'.*'fallback'"):
        make_plan(forbidden, nodes(2))


def test_control_on_loopback_is_refused_when_workers_are_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"proxy\.control_host"):
        make_plan(ClusterConfig(proxy=ProxyConfig(control_host="127.0.0.1")), nodes(2, host="10.1.2.3"))
    plan = make_plan(config(1, 1), nodes(2, host="10.1.2.3"))
    assert (len(plan.stores), plan.proxy_host, plan.control_host) == (2, "127.0.0.1", "10.1.2.3"), "clients and members come different ways"


@pytest.mark.parametrize(("host", "expected"), [("0.0.0.0", "10.1.2.3"), ("::", "10.1.2.3"), ("10.9.9.9", "10.9.9.9")])
def test_others_are_told_an_address_of_the_proxy_that_they_can_reach(host: str, expected: str) -> None:
    plan = make_plan(ClusterConfig(proxy=ProxyConfig(host=host)), nodes(2, host="10.1.2.3"))
    assert plan.proxy_host == expected


def test_a_proxy_that_listens_on_everything_on_a_node_of_loopback_is_out_of_reach_from_elsewhere() -> None:
    mixed = [RayNode("node-0", "127.0.0.2", 0.0), RayNode("node-1", "10.1.2.3", 0.0)]
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1"):
        make_plan(ClusterConfig(proxy=ProxyConfig(host="0.0.0.0")), mixed)
