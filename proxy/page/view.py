"""What the page shows, as plain data: the cluster, the last minutes, requests under way and lately. No prompt, no text, no error's words.

Router ─► view ─► a dictionary for JSON, of bounded size
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

from ...protocol.roles import ROLE_NAMES
from ...protocol.v1 import common_pb2, control_pb2
from ..members.member import Member
from ..members.rebalancer import NotedChange
from ..requests.decisions import RequestDecision
from ..requests.phase_clock import handoff_s
from ..requests.readiness import missing_parts
from ..requests.router import Router
from ..timeline import BIN_S

MAX_MEMBERS = 256
MAX_UNDER_WAY = 16
MAX_ENDED = 16
MAX_ROLE_CHANGES = 4
DIGITS = 6  # of seconds


def view(router: Router) -> dict[str, Any]:
    """All times are durations in seconds; None: not known yet, or none."""
    config, metrics = router.config, router.metrics
    members = sorted(router.cluster.members.values(), key=lambda member: (member.role, member.id))
    return {
        "policy": config.policy,
        "admission": config.admission,
        "draining": router.draining,
        "missing": missing_parts(router),
        "slo": {"ttft_s": config.ttft_slo_s or None, "tpot_s": config.tpot_slo_s or None},
        "num_waiting": router.num_queued,
        "num_running": router.num_running,
        "num_members": len(members),
        "members": [_member(member) for member in members[:MAX_MEMBERS]],
        "role_changes": [_role_change(change) for change in router.role_changes[:MAX_ROLE_CHANGES]],
        "absences": [_absence(absence) for absence in router.cluster.absences.to_proto()],
        "latest": {"ttft_s": _percentiles(metrics.ttft_window.percentiles()), "tpot_s": _percentiles(metrics.tpot_window.percentiles())},
        "bin_s": BIN_S,
        "bins": metrics.timeline.rows(),
        "under_way": _requests(router.under_way(), MAX_UNDER_WAY),
        "ended": _requests(router.decisions.ended(), MAX_ENDED),
    }


def _member(member: Member) -> dict[str, Any]:
    load = member.load
    return {
        "id": member.id,
        "role": member.role,
        "role_reason": member.role_reason,
        "device": member.info.device,
        "up_s": round(member.up_s, 1),
        "silent_s": round(member.silent_s, 1),
        "step_age_s": round(load.step_age_s, 1),
        "avoided": member.avoided,
        "num_running": load.num_running,
        "num_waiting": load.num_waiting,
        "num_tokens": load.num_outstanding_tokens,
        "kv_capacity_tokens": member.info.kv_capacity_tokens,
        "kv_used": round(load.kv_usage_ratio, 4),
        "kv_leased": round(load.kv_leased_ratio, 4),
        "num_cached_pages": load.num_cached_pages,
        "ssd_bytes": load.ssd_bytes,
        "ssd_used_bytes": load.ssd_used_bytes,
    }


def _role_change(noted: NotedChange) -> dict[str, Any]:
    """Of a change that failed without the error's words."""
    change, for_s = noted.change, time.monotonic() - noted.at
    return {"id": change.member_id, "role": change.role, "reason": change.reason, "failed": bool(noted.error), "for_s": round(for_s, 1)}


def _absence(absence: control_pb2.StatusReply.Absence) -> dict[str, Any]:
    return {"id": absence.info.id, "role": ROLE_NAMES.get(absence.info.role, "unknown"), "for_s": round(absence.for_s, 1)}


def _percentiles(found: control_pb2.StatusReply.Percentiles) -> dict[str, Any] | None:
    if not found.count:
        return None
    return {"p50": _rounded(found.p50), "p99": _rounded(found.p99), "count": found.count}


def _requests(decisions: Iterable[RequestDecision], limit: int) -> list[dict[str, Any]]:
    now = time.monotonic()
    return [_request(decision, now) for decision in itertools.islice(decisions, limit)]


def _request(decision: RequestDecision, now: float) -> dict[str, Any]:
    record = decision.record
    return {
        "id": decision.label or decision.request_id,  # what its client knows it by
        "state": decision.state,
        "reason": decision.ended.partition(":")[0],  # the error's words behind it may quote the client
        "age_s": round(now - decision.arrival, 3),
        "num_prompt_tokens": decision.num_tokens,
        "num_tokens": decision.num_output_tokens,
        "prefill": record.prefill_worker,
        "decode": record.decode_worker,
        "transport": record.transport,
        "num_attempts": record.num_attempts,
        "phases": {name: _rounded(value) for name, value in to_first_token(record).items()},
        "ttft_s": _rounded(record.ttft_s) or None,
        "tpot_s": _rounded(record.tpot_s) or None,
        "e2e_s": _rounded(record.e2e_s) or None,
        "ttft_slo_s": _bound(decision.slo.ttft_s),
        "tpot_slo_s": _bound(decision.slo.tpot_s),
    }


def to_first_token(record: common_pb2.PhaseRecord) -> dict[str, float]:
    """In order of time. Once the first token has come they add up to ttft_s."""
    return {
        "queue": record.queue_s,
        "prefill_queue": record.prefill_queue_s,
        "prefix_load": record.prefix_load_s,
        "prefill": record.prefill_s,
        "handoff": max(handoff_s(record), 0.0) if record.ttft_s else 0.0,
        "write": record.write_s,
    }


def _bound(limit_s: float) -> float | None:
    return limit_s if limit_s != float("inf") else None


def _rounded(value: float) -> float:
    return round(value, DIGITS)
