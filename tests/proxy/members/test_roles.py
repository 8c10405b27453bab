"""A worker's role as the proxy sees and sets it, over real Join streams."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from halfmoon.protocol.errors import DeadlineExceeded, InvalidRequest, Overloaded, WorkerLost
from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.conductor.backlog import QueuePlace
from halfmoon.proxy.members.orders import Orders
from halfmoon.tests.waiting import within


def pools(bench: Any) -> tuple[list[str], list[str]]:
    snapshot = bench.cluster.snapshot(4)
    return [member.id for member in snapshot.prefill], [member.id for member in snapshot.decode]


async def test_a_worker_of_both_roles_is_a_candidate_for_either(make_bench: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    assert pools(bench) == (["both-0", "prefill-0"], ["both-0", "decode-0"])
    assert [member.role for member in bench.cluster.snapshot(4).prefill] == ["coupled", "prefill"]
    assert bench.sample("halfmoon_members", role="both") == 1


async def test_a_pair_of_one_worker_is_a_local_prefill(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 0, num_both=1)
    request = bench.request()
    token_ids, finished = await within(5, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request)
    (call,) = bench.boths[0].requests
    assert call.local_prefill and finished.phases.transport == "local"
    bench.assert_at_rest()


async def test_two_workers_of_both_roles_hand_off_to_each_other(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 0, num_both=2, policy="random")
    pairs = set()
    for _ in range(60):
        request = bench.request()
        token_ids, finished = await within(5, peers.read(bench.router.open(request)))
        assert token_ids == peers.answer(request)
        pairs.add((finished.phases.prefill_worker, finished.phases.decode_worker))
    assert pairs == {(prefill, decode) for prefill in ("both-0", "both-1") for decode in ("both-0", "both-1")}
    bench.assert_at_rest()


async def test_backlog_and_context_of_both_roles_are_counted_apart(make_bench: Any) -> None:
    bench = await make_bench(0, 0, num_both=1)
    member = bench.cluster.members["both-0"]
    member.context.place(500)
    member.backlog.place(1000, 3.0, QueuePlace(0), 0.0)
    for _ in range(2):
        member.report(control_pb2.MemberLoad(num_outstanding_tokens=7, num_prefill_tokens=300))
    assert member.state.num_outstanding_tokens == 500 and member.backlog.assigned.num_left_tokens == 300


async def test_a_role_that_is_set_is_confirmed_and_moves_the_worker_between_the_pools(make_bench: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    cluster, member = bench.cluster, bench.cluster.members["both-0"]
    for role, expected in (
        ("prefill", (["both-0", "prefill-0"], ["decode-0"])),
        ("decode", (["prefill-0"], ["both-0", "decode-0"])),
        ("both", (["both-0", "prefill-0"], ["both-0", "decode-0"])),
    ):
        await within(2, cluster.set_role(member, role, 60.0))
        assert pools(bench) == expected and bench.boths[0].taken[-1] == role
        assert bench.sample("halfmoon_members", role=role) == (1 if role == "both" else 2)
    await asyncio.sleep(0.5)  # reports in turn tell of the role that it has
    assert member.role == "both"


async def test_what_runs_ends_where_it_is_when_the_role_changes(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    for peer in (*bench.prefills, *bench.decodes):
        await peer.leave()
    while len(bench.cluster.members) > 2:
        await asyncio.sleep(0.01)
    gate = asyncio.Event()

    async def pause(index: int) -> None:
        if index == 2:
            await gate.wait()

    bench.boths[0].before_token = pause
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, anext(stream))
    await within(2, bench.cluster.set_role(bench.cluster.members["both-0"], "prefill", 60.0))
    gate.set()
    rest, finished = await within(2, peers.read(stream))
    assert rest == peers.answer(request)[1:] and finished.phases.num_attempts == 1
    bench.assert_at_rest()


async def test_a_refusal_is_the_worker_s_own_error_and_leaves_the_role_as_it_was(make_bench: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    member = bench.cluster.members["both-0"]
    bench.boths[0].refusal = Overloaded("its pages are full of prompts", retry_after_s=3.0)
    with pytest.raises(Overloaded, match="full of prompts") as refusal:
        await within(2, bench.cluster.set_role(member, "decode", 60.0))
    assert refusal.value.fields["retry_after_s"] == 3.0
    assert pools(bench) == (["both-0", "prefill-0"], ["both-0", "decode-0"])
    bench.boths[0].refusal = None
    await within(2, bench.cluster.set_role(member, "decode", 60.0))
    assert member.role == "decode"


async def test_a_role_that_a_worker_does_not_have_is_not_ordered(make_bench: Any) -> None:
    bench = await make_bench(1, 1)
    with pytest.raises(InvalidRequest, match=r"prefill-0 .*can't take on the role both"):
        await bench.cluster.set_role(bench.cluster.members["prefill-0"], "both", 60.0)
    assert bench.prefills[0].taken == []


async def test_a_worker_that_leaves_before_it_answers_is_lost(make_bench: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    member = bench.cluster.members["both-0"]
    member.orders._write = forget  # the order is lost on its way
    setting = asyncio.create_task(bench.cluster.set_role(member, "decode", 60.0))
    await asyncio.sleep(0)
    assert pools(bench)[0] == ["prefill-0"], "placements go by the new role at once"
    await bench.boths[0].leave()
    with pytest.raises(WorkerLost, match="both-0"):
        await within(2, setting)


async def test_a_worker_that_does_not_answer_has_its_former_role_again_and_a_late_answer_counts(make_bench: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    cluster, member = bench.cluster, bench.cluster.members["both-0"]
    member.orders._write = forget
    with pytest.raises(DeadlineExceeded, match="both-0"):
        await cluster.set_role(member, "decode", 0.05)
    assert member.role == "both" and not member.orders.pending
    cluster.report(member, control_pb2.MemberLoad(), control_pb2.ROLE_DECODE)
    assert member.role == "decode", "it took the role on after all, and says so"


async def test_a_role_that_nobody_knows_is_refused(make_bench: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    cluster, member = bench.cluster, bench.cluster.members["both-0"]
    with pytest.raises(InvalidRequest, match="role number 9"):
        cluster.report(member, control_pb2.MemberLoad(), 9)
    newcomer = control_pb2.MemberInfo()
    newcomer.CopyFrom(member.info)
    newcomer.incarnation = "other"
    with pytest.raises(InvalidRequest, match="must join with a role"):
        cluster.join(newcomer, control_pb2.MemberLoad(), 9)
    assert member.role == "both" and not member.gone


async def test_a_worker_that_comes_back_says_which_role_it_has_now(make_bench: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    cluster, member = bench.cluster, bench.cluster.members["both-0"]
    assert cluster.join(member.info, control_pb2.MemberLoad(), control_pb2.ROLE_DECODE) is member and member.role == "decode"
    newcomer = control_pb2.MemberInfo()
    newcomer.CopyFrom(member.info)
    newcomer.incarnation = "other"
    assert cluster.join(newcomer, control_pb2.MemberLoad(), control_pb2.ROLE_PREFILL).role == "prefill", "to a new proxy, say"


async def test_two_who_set_a_role_at_once_do_it_one_after_the_other(make_bench: Any) -> None:
    bench = await make_bench(1, 1, num_both=1)
    cluster, member = bench.cluster, bench.cluster.members["both-0"]
    await within(2, asyncio.gather(cluster.set_role(member, "decode", 60.0), cluster.set_role(member, "prefill", 60.0)))
    assert bench.boths[0].taken == ["decode", "prefill"] and member.role == "prefill"


async def test_a_store_refuses_a_role(make_bench: Any) -> None:
    bench = await make_bench(1, 1)
    with pytest.raises(InvalidRequest, match="store-0"):
        await bench.cluster.set_role(bench.cluster.members["store-0"], "decode", 60.0)


async def test_orders_go_behind_the_acceptance_and_one_after_the_other() -> None:
    """A stream takes no message while another one is being written."""
    sent: list[control_pb2.MemberOrder] = []
    writing: control_pb2.MemberOrder | None = None

    class Somebody:
        id, title = "both-0", "both worker both-0"

    async def write(order: control_pb2.MemberOrder) -> None:
        nonlocal writing
        assert writing is None
        writing = order
        await asyncio.sleep(0)
        sent.append(order)
        writing = None

    orders = Orders(Somebody())
    opening = asyncio.create_task(orders.open(write, control_pb2.MemberOrder(accepted=True)))
    await asyncio.sleep(0)
    giving = [
        asyncio.create_task(orders.give(control_pb2.MemberOrder(role=role))) for role in (control_pb2.ROLE_BOTH, control_pb2.ROLE_DECODE)
    ]
    await opening
    while len(sent) < 3:
        await asyncio.sleep(0)
    assert [order.accepted for order in sent] == [True, False, False] and [order.number for order in sent] == [0, 1, 2]
    for number in (2, 1):
        orders.answered(control_pb2.OrderAnswer(number=number))
    await asyncio.gather(*giving)
    assert not orders.pending


async def test_without_a_stream_there_is_nobody_to_order() -> None:
    class Somebody:
        id, title = "decode-0", "decode worker decode-0"

    with pytest.raises(WorkerLost, match="decode-0"):
        await Orders(Somebody()).give(control_pb2.MemberOrder(role=control_pb2.ROLE_BOTH))


async def forget(order: control_pb2.MemberOrder) -> None:
    return None
