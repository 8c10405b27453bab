"""Roles as a policy decides them, ordered and noted, over real Join streams."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.errors import InternalError, Overloaded
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc
from halfmoon.proxy.conductor.backlog import QueuePlace
from halfmoon.proxy.conductor.placement import Snapshot
from halfmoon.proxy.conductor.policies.base import RoleChange
from halfmoon.proxy.members.rebalancer import FIXED_S, NUM_NOTED, Rebalancer
from halfmoon.tests.waiting import until, within

NEVER_S = 10_000.0


class Script:
    """Decides what the test says, one decision after the other."""

    def __init__(self, *decisions: tuple[RoleChange, ...]) -> None:
        self.decisions = deque(decisions)
        self.asked: list[tuple[Snapshot, frozenset[str]]] = []
        self.num_pieces = 0

    def deliberate(self, snapshot: Snapshot, fixed: frozenset[str]) -> Generator[None, None, tuple[RoleChange, ...]]:
        self.asked.append((snapshot, fixed))
        for _ in range(self.num_pieces):
            yield
        return self.decisions.popleft() if self.decisions else ()


def become(role: Any, *ids: str) -> tuple[RoleChange, ...]:
    return tuple(RoleChange(member_id, role, "slo", "98% with, 60% without") for member_id in ids)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def made(bench: Any, script: Any, clock: Any, interval_s: float = NEVER_S) -> Rebalancer:
    return Rebalancer(bench.cluster, script, bench.metrics.members, interval_s=interval_s, clock=clock)


def roles(bench: Any) -> dict[str, str]:
    return {member.id: member.role for member in bench.cluster.members.values() if member.role != "store"}


async def test_what_is_decided_is_ordered_confirmed_counted_and_told(make_bench: Any, clock: Clock) -> None:
    bench = await make_bench(0, 0, num_both=2)
    found = made(bench, Script(become("prefill", "both-0")), clock)
    await within(2, found.rebalance())
    assert roles(bench) == {"both-0": "prefill", "both-1": "both"} and bench.boths[0].taken == ["prefill"]
    assert bench.cluster.members["both-0"].role_reason == "98% with, 60% without"
    assert bench.sample("halfmoon_role_changes_total", new_role="prefill", reason="slo") == 1
    assert bench.sample("halfmoon_role_change_failures_total") == 0
    (noted,) = found.noted
    assert (noted.change.member_id, noted.former, noted.error) == ("both-0", "both", "")
    await found.close()


async def test_every_worker_is_shown_with_all_that_was_placed_on_it(make_bench: Any, clock: Clock) -> None:
    bench = await make_bench(1, 1, num_both=1)
    prefill, decode = bench.cluster.members["prefill-0"], bench.cluster.members["decode-0"]
    bench.prefills[0].load = control_pb2.MemberLoad(num_outstanding_tokens=1000)
    clock.now = time.monotonic()
    prefill.backlog.place(1000, 1e6, QueuePlace(2**40), clock.now)
    decode.context.place(30).begin()
    await within(2, bench.cluster.set_role(bench.cluster.members["both-0"], "decode", 60.0))
    script = Script()
    found = made(bench, script, clock)
    await within(2, found.rebalance())
    ((seen, fixed),) = script.asked
    states = {one.id: one for one in seen.decode}
    assert {one.id: one.role for one in seen.decode} == {"both-0": "decode", "decode-0": "decode", "prefill-0": "prefill"}
    assert states["decode-0"].num_running == 1 and seen.now_s == clock.now
    assert (states["prefill-0"].busy_until_s or 0.0) - clock.now == pytest.approx(1e6, rel=1e-3)
    assert fixed == {"prefill-0", "decode-0"}, "they have one role for good"


async def test_what_a_worker_decodes_is_still_shown_once_it_has_another_role(make_bench: Any) -> None:
    bench = await make_bench(0, 0, num_both=1)
    member = bench.cluster.members["both-0"]
    running = member.context.place(30)
    running.begin()
    await within(2, bench.cluster.set_role(member, "prefill", 60.0))
    (seen,) = bench.cluster.workers(4, 0.0).decode
    assert (seen.role, seen.num_running, seen.num_running_tokens, seen.num_outstanding_tokens) == ("prefill", 1, 30, 0)
    running.end()


async def test_a_refusal_is_told_leaves_the_role_and_the_worker_is_left_alone_for_a_while(make_bench: Any, clock: Clock) -> None:
    bench = await make_bench(0, 0, num_both=2)
    bench.boths[0].refusal = Overloaded("its pages are full of prompts", retry_after_s=3.0)
    script = Script(become("decode", "both-0", "both-1"))
    found = made(bench, script, clock)
    await within(2, found.rebalance())
    assert roles(bench) == {"both-0": "both", "both-1": "decode"}, "one change does not need the other"
    assert bench.sample("halfmoon_role_change_failures_total", new_role="decode", code="overloaded") == 1
    assert bench.sample("halfmoon_role_changes_total", new_role="decode") == 1
    assert {noted.change.member_id: noted.error for noted in found.noted} == {"both-0": "its pages are full of prompts", "both-1": ""}
    assert bench.cluster.members["both-0"].role_reason == ""
    for waited_s, expected in ((0.0, {"both-0"}), (FIXED_S - 0.1, {"both-0"}), (FIXED_S, set())):
        clock.now = 100.0 + waited_s
        await within(2, found.rebalance())
        assert script.asked[-1][1] == expected


async def test_a_worker_that_answers_with_another_role_keeps_its_former_one(make_bench: Any) -> None:
    bench = await make_bench(0, 0, num_both=1)
    member = bench.cluster.members["both-0"]

    async def answer_wrongly(order: control_pb2.MemberOrder) -> None:
        member.orders.answered(control_pb2.OrderAnswer(number=order.number), control_pb2.ROLE_PREFILL)

    member.orders._write = answer_wrongly
    with pytest.raises(InternalError, match="was to take on the role decode and says that it has the role prefill"):
        await within(2, bench.cluster.set_role(member, "decode", 60.0))
    assert member.role == "both"


async def test_a_worker_that_left_meanwhile_is_passed_over(make_bench: Any, clock: Clock) -> None:
    bench = await make_bench(0, 0, num_both=1)
    found = made(bench, Script(become("decode", "both-7")), clock)
    await within(2, found.rebalance())
    assert not found.noted


async def test_when_a_worker_leaves_roles_are_decided_at_once(make_bench: Any, clock: Clock) -> None:
    bench = await make_bench(0, 0)
    script = Script(become("decode", "both-0"))
    found = made(bench, script, clock)
    store = bench.stores[0]
    await bench.add("both", store)
    await bench.add("both", store)
    await bench.boths[1].leave()
    await until(lambda: roles(bench) == {"both-0": "decode"} and found.noted)
    await found.close()


async def test_the_event_loop_serves_others_between_the_pieces_of_a_decision(make_bench: Any, clock: Clock, loop_turns: Any) -> None:
    bench = await make_bench(0, 0, num_both=1)
    script = Script()
    script.num_pieces = 50
    found = made(bench, script, clock)
    async with loop_turns() as turns:
        await found.rebalance()
    assert turns.num >= 50


async def test_only_the_latest_changes_are_remembered(make_bench: Any, clock: Clock) -> None:
    bench = await make_bench(0, 0, num_both=1)
    kinds = ["prefill", "decode"] * NUM_NOTED
    found = made(bench, Script(*(become(role, "both-0") for role in kinds)), clock)
    for _ in kinds:
        await within(2, found.rebalance())
    assert [noted.change.role for noted in found.noted] == ["decode", "prefill"] * (NUM_NOTED // 2)
    assert bench.boths[0].taken == kinds


# behind a router


async def test_adaptive_gives_roles_by_itself_and_status_says_which_and_why(make_bench: Any) -> None:
    bench = await make_bench(0, 0, policy="adaptive", rebalance_s=0.01)
    bench.router._rebalancer._roles = Script(become("prefill", "both-0"))
    await bench.add("both", bench.stores[0])
    await until(lambda: bench.router.role_changes)
    async with open_channel(bench.address) as channel:
        status = await control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest())
    (found,) = status.role_changes
    assert (found.member, found.role, found.former, found.error) == ("both-0", control_pb2.ROLE_PREFILL, control_pb2.ROLE_BOTH, "")
    (worker,) = (one for one in status.members if one.info.id == "both-0")
    assert (worker.role, worker.role_reason) == (control_pb2.ROLE_PREFILL, found.reason)


@pytest.mark.parametrize(
    ("config", "flows", "one_pool"),
    [
        ({"policy": "adaptive"}, True, True),
        ({"policy": "adaptive", "local_prefill": "never"}, True, False),
        ({"policy": "adaptive", "local_prefill": "always"}, False, False),
        ({"policy": "adaptive", "rebalance_s": 0.0}, False, False),
        ({"policy": "cache_aware"}, False, False),
    ],
)
async def test_roles_flow_where_the_policy_plans_them_and_workers_may_have_them(
    make_bench: Any, config: dict[str, Any], flows: bool, one_pool: bool
) -> None:
    bench = await make_bench(0, 0, **config)
    assert (bench.router._rebalancer is not None, bench.cluster.one_pool) == (flows, one_pool)


async def test_a_request_finds_a_worker_to_decode_it_where_nobody_has_that_role(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 0, num_both=2, policy="adaptive", rebalance_s=NEVER_S)
    for member in list(bench.cluster.members.values()):
        if member.role != "store":
            await within(2, bench.cluster.set_role(member, "prefill", 60.0))
    request = bench.request()
    token_ids, _ = await within(5, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request)
    bench.assert_at_rest()


async def test_the_policy_is_told_of_each_arrival_once_and_of_each_end(make_bench: Any, peers: Any) -> None:
    """Under this order a request that will be late is placed twice."""
    bench = await make_bench(0, 0, num_both=2, policy="adaptive", order="late", ttft_slo_s=1e-9, rebalance_s=NEVER_S)
    planner = bench.router.conductor.policy
    for _ in range(3):
        await within(5, peers.read(bench.router.open(bench.request(list(range(20, 60)), max_tokens=6))))
    assert [one.num_new_tokens + one.num_prefix_tokens for one in planner.arrivals] == [40, 40, 40]
    assert planner.answer_len == pytest.approx(6.0)
