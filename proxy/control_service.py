"""halfmoon.v1.Control: members join and report, operators read the status and drain."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator

import grpc.aio

from ..protocol.durations import seconds
from ..protocol.errors import HalfmoonError, InvalidRequest, WorkerLost, shown
from ..protocol.grpc_errors import unary_boundary
from ..protocol.roles import ROLE_NUMBERS
from ..protocol.v1 import control_pb2, control_pb2_grpc
from .requests.explanation import explain
from .requests.router import Router

MAX_ID_LEN = 128
logger = logging.getLogger(__name__)


class ControlService(control_pb2_grpc.ControlServicer):
    def __init__(self, router: Router, model_name: str) -> None:
        self._router = router
        self._cluster = router.cluster
        self._model_name = model_name
        self._started = time.monotonic()

    # a coroutine that writes, not a generator: its finally runs at the end of the stream, not when the collector gets to it
    @unary_boundary
    async def Join(self, reports: AsyncIterator[control_pb2.MemberReport], context: grpc.aio.ServicerContext) -> None:
        first = await anext(aiter(reports), None)
        if first is None or not first.HasField("info"):
            raise InvalidRequest("the first report of a Join stream says who the member is; send MemberReport.info")
        if len(first.info.id) > MAX_ID_LEN or not first.info.id.isprintable():  # it goes into the log
            raise InvalidRequest(f"the member's id is {shown(first.info.id)}; it must be printable, {MAX_ID_LEN} characters at most")
        latest = await self._progressing(first, reports)
        if latest is None:
            return
        try:
            member = self._cluster.join(first.info, latest.load, latest.role)
        except HalfmoonError as error:
            if first.info.id not in self._cluster.members:
                self._cluster.absences.note(first.info, f"refused: {error.message}")
            raise
        stream = member.stream
        try:
            await member.orders.open(context.write, self._cluster.acceptance(member))
            if first.HasField("prefixes"):
                self._cluster.prefixes_changed(member, first.prefixes)
            async for report in reports:
                if member.gone or member.stream != stream:
                    return  # a newer process, or a newer stream of this one, has replaced it
                if report.HasField("broken"):
                    member.broken = report.broken
                    logger.error(
                        "%s broke while it computed %d requests: %s", member.title, len(report.broken.request_ids), report.broken.reason
                    )
                    return
                if report.HasField("answer"):
                    member.orders.answered(report.answer, report.role)
                self._cluster.report(member, report.load, report.role)
                if report.HasField("prefixes"):
                    self._cluster.prefixes_changed(member, report.prefixes)
        finally:
            if member.stream == stream:
                member.orders.closed()
            self._cluster.leave(member, stream)

    async def _progressing(
        self, first: control_pb2.MemberReport, reports: AsyncIterator[control_pb2.MemberReport]
    ) -> control_pb2.MemberReport | None:
        """The report from which on the member makes progress; None where it has left before. Raises WorkerLost, which ends the member."""
        latest, num_stalled = first, 0
        while why := self._router.liveness.stalled(latest.load):
            if not num_stalled:
                logger.warning("%s joins once it makes progress: %s", first.info.id, why)
            num_stalled += 1
            if self._router.liveness.gave_up(num_stalled):
                raise WorkerLost(f"{first.info.id} makes no progress: {why}; end this process", worker=first.info.id)
            report = await anext(aiter(reports), None)
            if report is None or report.HasField("broken"):
                return None
            latest = report
        return latest

    @unary_boundary
    async def Status(self, request: control_pb2.StatusRequest, context: grpc.aio.ServicerContext) -> control_pb2.StatusReply:
        router, metrics = self._router, self._router.metrics
        return control_pb2.StatusReply(
            members=[
                control_pb2.StatusReply.Member(
                    info=member.info,
                    load=member.load,
                    up_s=member.up_s,
                    role=ROLE_NUMBERS[member.role],
                    silent_s=member.silent_s,
                    avoided=member.avoided,
                    role_reason=member.role_reason,
                )
                for member in sorted(self._cluster.members.values(), key=lambda member: (member.info.role, member.id))
            ],
            model=self._model_name,
            num_queued=router.num_queued,
            num_running=router.num_running,
            draining=router.draining,
            ttft_s=metrics.ttft_window.percentiles(),
            tpot_s=metrics.tpot_window.percentiles(),
            outcomes=metrics.outcomes,
            up_s=time.monotonic() - self._started,
            policy=router.config.policy,
            admission=router.config.admission,
            order=router.config.order,
            prediction_errors=metrics.mean_errors,
            rejections=metrics.rejections,
            num_in_slo=metrics.num_in_slo,
            num_outside_slo=metrics.num_outside_slo,
            absences=self._cluster.absences.to_proto(),
            role_changes=[change.to_proto() for change in router.role_changes],
        )

    @unary_boundary
    async def MemberIds(self, request: control_pb2.MemberIdsRequest, context: grpc.aio.ServicerContext) -> control_pb2.MemberIdsReply:
        return control_pb2.MemberIdsReply(ids=self._cluster.members)

    @unary_boundary
    async def Explain(self, request: control_pb2.ExplainRequest, context: grpc.aio.ServicerContext) -> control_pb2.ExplainReply:
        config, found = self._router.config, self._router.decisions.find(request.request_id)
        return control_pb2.ExplainReply(requests=[explain(decision, config.policy, config.admission) for decision in found])

    @unary_boundary
    async def Drain(self, request: control_pb2.DrainRequest, context: grpc.aio.ServicerContext) -> control_pb2.DrainReply:
        return control_pb2.DrainReply(num_left=await self._router.drain(seconds(request.timeout_s, "timeout_s")))
