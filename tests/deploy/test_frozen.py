"""Who is frozen: members by what the proxy says of them, the proxy by its silence. And what the supervisor does about it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from halfmoon.deploy.cluster import make_spec
from halfmoon.deploy.frozen import CHECK_INTERVAL_S, Frozen, Looked
from halfmoon.deploy.ray_session import RayNode
from halfmoon.deploy.supervisor import Member, Supervisor
from halfmoon.protocol.channel import create_server
from halfmoon.protocol.config import ClusterConfig, ModelOptions, ProxyConfig
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc

CONFIG = ProxyConfig(leave_after_s=2.5, restart_after_s=10.0)
SERVING = {"proxy": 1, "store-0": 1, "decode-0": 1}
ALL = frozenset({"store-0", "decode-0"})


class Supervision:
    """Looks at the usual times of a clock of its own."""

    def __init__(self) -> None:
        self.frozen, self.now, self.serving = Frozen(CONFIG), 0.0, dict(SERVING)

    def looks(self, seconds: float, members: frozenset[str] | None) -> list[Looked]:
        """Those with news."""
        found: list[Looked] = []
        for _ in range(round(seconds / CHECK_INTERVAL_S)):
            found.append(self.frozen.look(self.now, self.serving, members))
            self.now += CHECK_INTERVAL_S
        return [look for look in found if look != Looked("", [])]


def test_a_member_that_the_proxy_has_left_is_frozen_once_the_time_is_over_and_each_process_once() -> None:
    supervision = Supervision()
    supervision.looks(5.0, ALL)
    assert supervision.looks(10.0, ALL - {"decode-0"}) == []
    assert supervision.looks(8.0, ALL - {"decode-0"}) == [Looked("", ["decode-0"])]
    supervision.serving["decode-0"] = 2
    assert supervision.looks(9.0, ALL - {"decode-0"}) == [], "the next process has as long"


def test_a_member_that_comes_back_or_starts_again_is_not_frozen() -> None:
    supervision = Supervision()
    supervision.looks(8.0, ALL - {"decode-0"})
    supervision.looks(0.5, ALL)
    assert supervision.looks(9.5, ALL - {"decode-0"}) == []
    del supervision.serving["decode-0"]
    assert supervision.looks(60.0, ALL - {"decode-0"}) == [], "a process that loads its model takes as long as it takes"


def test_a_proxy_that_does_not_answer_is_told_within_3_s_and_is_frozen_in_the_end_and_no_member_with_it() -> None:
    supervision = Supervision()
    supervision.looks(1.0, ALL)
    assert supervision.looks(3.0, None) == [Looked("has not answered for 3.0 s", [])]
    assert supervision.looks(1.0, ALL) == [Looked("answers again", [])]
    told, frozen = supervision.looks(12.0, None)
    assert (told.said, told.frozen) == ("has not answered for 3.0 s", []) and frozen.frozen == ["proxy"]


def test_nobody_is_judged_by_time_in_which_the_supervisor_slept() -> None:
    supervision = Supervision()
    supervision.looks(1.0, ALL)
    supervision.now += 3600.0
    assert supervision.looks(1.0, None) == []
    supervision.now += 3600.0
    assert supervision.looks(1.0, ALL - {"decode-0"}) == []


class Listed(control_pb2_grpc.ControlServicer):
    def __init__(self, *member_ids: str) -> None:
        self._reply = control_pb2.MemberIdsReply(ids=member_ids)

    async def MemberIds(self, request: control_pb2.MemberIdsRequest, context: object) -> control_pb2.MemberIdsReply:
        return self._reply


class Ending(Supervisor):
    ended: asyncio.Queue[str]

    def _kill(self, member: Member) -> None:
        self.ended.put_nowait(member.id)


@pytest.mark.parametrize("answers", [True, False])
async def test_the_supervisor_ends_the_process_that_is_frozen_and_no_other(model_folder: Path, answers: bool) -> None:
    """One whose proxy answers without prefill-0, and one whose proxy has a port and never answers."""
    config = ClusterConfig(model=ModelOptions(path=str(model_folder)), proxy=ProxyConfig(leave_after_s=1.0, restart_after_s=2.0))
    said: list[str] = []
    supervisor = Ending(
        make_spec(config, [RayNode("node-0", "127.0.0.1", 0.0)]), lambda member_id, event: said.append(f"{member_id} {event}")
    )
    supervisor.ended = asyncio.Queue()
    server, port = create_server("127.0.0.1", 0, credentials=supervisor.credentials)
    control_pb2_grpc.add_ControlServicer_to_server(Listed("store-0", "decode-0"), server)
    if answers:
        await server.start()
    members = [supervisor._proxy(), supervisor._store(supervisor._spec.plan.stores[0])]
    members += [supervisor._worker(supervisor._spec.plan.workers[role][0], role) for role in ("prefill", "decode")]
    for member in members:
        supervisor._members[member.id], member.is_up = member, True
    members[0].is_up = not answers  # so that a machine which is slow to answer is not judged for it
    members[0].address = ("", "", f"127.0.0.1:{port}", "")
    looking = asyncio.create_task(supervisor._end_frozen())
    try:
        assert await supervisor.ended.get() == ("prefill-0" if answers else "proxy")
        assert [line.split()[0] for line in said] == (["prefill-0"] if answers else ["proxy", "proxy"])
    finally:
        looking.cancel()
        await asyncio.wait({looking})
        await server.stop(0)
