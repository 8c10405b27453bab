"""Who is missing, silent or stuck, by the proxy's status: a store first, because its workers go with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from ...protocol.address import split_address
from ...protocol.roles import ROLE_NAMES
from ...protocol.v1 import control_pb2
from ..checks.finding import Finding, ok
from .here import is_stopped

SILENT_S = 1.0  # five reports
STUCK_S = 10.0
CONNECT_TIMEOUT_S = 2.0


def look_at_members(status: control_pb2.StatusReply) -> list[Finding]:
    """The worst first."""
    absences = sorted(status.absences, key=lambda one: one.info.role != control_pb2.ROLE_STORE)
    found = [_absent(one, status) for one in absences]
    known = {one.info.id for one in (*status.members, *absences)}
    found += [_store_missing(store_id, status) for store_id in sorted({one.info.store_id for one in status.members} - known - {""})]
    found += [finding for member in status.members if (finding := _stuck(member)) is not None]
    if not any(member.info.role != control_pb2.ROLE_STORE for member in status.members):
        found.append(Finding("members", "fault", "no worker is there: every request is refused", "see the log of halfmoon serve"))
    if not found:
        found.append(ok("members", f"{len(status.members)} are there and report: {', '.join(one.info.id for one in status.members)}"))
    return found


def _absent(one: control_pb2.StatusReply.Absence, status: control_pb2.StatusReply) -> Finding:
    info = one.info
    name = ROLE_NAMES.get(info.role, "member")
    if is_stopped(info.pid, info.address):
        what = f"{info.id} is stopped: its process {info.pid} exists and does not run (SIGSTOP), so the proxy left it {one.for_s:.0f} s ago"
        return Finding("members", "fault", what, f"kill -CONT {info.pid}, and it joins again; or kill -9, and it is started again")
    if one.why.startswith("refused:"):
        return Finding("schema" if "KV formats differ" in one.why else "members", "fault", f"{info.id} is {one.why}")
    if name == "store":
        workers = [member.info.id for member in status.members if member.info.store_id == info.id]
        what = f"{info.id} is down for {one.for_s:.0f} s ({one.why}){_without(workers)}"
        return Finding(
            "store", "fault", what, "halfmoon serve starts it again by itself; its log in Ray's session folder says why it ended"
        )
    return Finding(
        "members",
        "fault",
        f"the {name} worker {info.id} is gone for {one.for_s:.0f} s: {one.why}",
        "halfmoon serve starts a dead one again; one that is frozen or has no network joins again when it runs",
    )


def _store_missing(store_id: str, status: control_pb2.StatusReply) -> Finding:
    workers = [member.info.id for member in status.members if member.info.store_id == store_id]
    return Finding("store", "fault", f"{store_id} is down: it has not joined{_without(workers)}", "start it again")


def _without(workers: Sequence[str]) -> str:
    """What becomes of workers whose store is gone."""
    return f"; {', '.join(workers)} find no prefix in it, and hand off through another store or not at all" if workers else ""


def _stuck(member: control_pb2.StatusReply.Member) -> Finding | None:
    info, load = member.info, member.load
    if is_stopped(info.pid, info.address):
        what = f"{info.id} is stopped: its process {info.pid} exists and does not run (SIGSTOP)"
        return Finding("members", "fault", what, f"kill -CONT {info.pid}")
    if member.silent_s > SILENT_S:
        what = f"{info.id} has not reported for {member.silent_s:.1f} s: its process hangs, or its network does"
        return Finding("members", "fault", what, "look at its machine; the proxy leaves it after proxy.leave_after_s")
    if load.step_age_s > STUCK_S + load.step_expected_s:
        what = f"{info.id} has been at one step for {load.step_age_s:.0f} s, which should take {load.step_expected_s:.3f} s"
        return Finding("members", "fault", what, "its GPU or its host is stuck; keep its log, then kill the process: it is started again")
    if load.transfer_age_s > STUCK_S:
        what = f"{info.id} has been at one copy to or from a store for {load.transfer_age_s:.0f} s"
        return Finding("members", "fault", what, "look at the network between it and the stores")
    return None


async def check_member_ports(members: Iterable[control_pb2.StatusReply.Member]) -> list[Finding]:
    """Whether this machine reaches every member's gRPC port and metrics page."""
    ports = [(member.info.id, what, address) for member in members for what, address in _ports(member.info)]
    reached = await asyncio.gather(*(_connects(address) for _, _, address in ports))
    found = [
        Finding(
            "ports",
            "warning",
            f"{name}'s {what} at {address} is not reached from here",
            "open the port to this machine, or run doctor on a machine of the cluster",
        )
        for (name, what, address), there in zip(ports, reached, strict=True)
        if not there
    ]
    return found or [ok("ports", f"{len(ports)} ports of members are reached from here")]


def _ports(info: control_pb2.MemberInfo) -> list[tuple[str, str]]:
    return [(what, address) for what, address in (("gRPC port", info.address), ("metrics page", info.metrics_address)) if address]


async def _connects(address: str) -> bool:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(*split_address(address))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
