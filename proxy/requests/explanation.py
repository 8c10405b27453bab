"""A remembered decision in words and numbers: what was predicted for each candidate, and what was measured.

RequestDecision (snapshot, predictors as they were) ─► Candidate predictions, made now ─► control_pb2.Explanation
                 record (phases as measured)       ─► Prediction: predicted, measured
"""

from __future__ import annotations

import math
import time

from ...protocol.v1 import common_pb2, control_pb2
from ..conductor.forecast import handoff_bytes, handoff_link, prefill_forecast
from ..conductor.member_state import MemberState
from ..conductor.placement import Placement, PrefixHint, Rejection
from ..conductor.policies import cached_blocks, policy_type
from ..conductor.policies.base import best_prefix
from ..conductor.predictors.waiting import step_with
from .decisions import AttemptDecision, RequestDecision
from .phase_clock import handoff_s


def explain(decision: RequestDecision, policy: str, admission: str) -> control_pb2.Explanation:
    record = decision.record
    attempts = [_attempt(attempt, policy, None) for attempt in decision.attempts[:-1]]
    if decision.attempts:
        last = decision.attempts[-1]
        num_placed = sum(isinstance(attempt.answer, Placement) for attempt in decision.attempts)
        attempts.append(_attempt(last, policy, record if record.num_attempts == num_placed else None))
    return control_pb2.Explanation(
        request_id=decision.request_id,
        state=decision.state,
        ended=decision.ended,
        num_tokens=decision.num_tokens,
        ttft_slo_s=_finite(decision.slo.ttft_s),
        tpot_slo_s=_finite(decision.slo.tpot_s),
        priority=decision.priority,
        age_s=time.monotonic() - decision.arrival,
        policy=policy,
        admission=admission,
        attempts=attempts,
        phases=record,
    )


def _attempt(attempt: AttemptDecision, policy: str, record: common_pb2.PhaseRecord | None) -> control_pb2.Explanation.Attempt:
    answer = attempt.answer
    placed = isinstance(answer, Placement)
    found = control_pb2.Explanation.Attempt(
        at_s=attempt.at_s,
        prefill=[_prefill_candidate(attempt, member, policy) for member in attempt.seen.prefill],
        decode=[_decode_candidate(attempt, member) for member in attempt.seen.decode],
        num_prefill=attempt.num_prefill,
        num_decode=attempt.num_decode,
        reason=answer.reason,
        error=attempt.error,
        queue_order=attempt.asked.place.queue_order,
    )
    if isinstance(answer, Rejection):
        found.rejection_code, found.retry_after_s = answer.code, answer.retry_after_s
        for name, value in (("ttft", answer.ttft_s), ("tpot", answer.tpot_s)):
            if value is not None:
                found.predictions.add(name=name, predicted_s=value)
    if placed:
        found.num_cached_tokens = answer.num_cached_tokens
        if answer.prefix is not None:
            found.prefix_store, found.prefix_blocks = answer.prefix
        asked = {one.id for one in found.prefill}
        if answer.is_local and answer.prefill.id not in asked:  # one decode worker was the prefill worker as well
            found.prefill.append(_prefill_candidate(attempt, answer.prefill, policy))
        found.predictions.extend(_predictions(attempt, answer, record))
    return found


def _prefill_candidate(attempt: AttemptDecision, member: MemberState, policy: str) -> control_pb2.Explanation.Candidate:
    asked, seen, answer = attempt.asked, attempt.seen, attempt.answer
    chosen, prefix = False, None
    if isinstance(answer, Placement) and answer.prefill.id == member.id:
        chosen, prefix, member = True, answer.prefix, answer.prefill
    elif policy_type(policy).fetches:  # otherwise only the candidate's own blocks count
        prefix = PrefixHint(*best_prefix(asked, seen.block_size))
    parts = prefill_forecast(attempt.predictors, asked, member, prefix, seen)
    return control_pb2.Explanation.Candidate(
        id=member.id,
        chosen=chosen,
        num_cached_blocks=cached_blocks(asked, member, seen.block_size),
        queue_s=parts.queue_s,
        transfer_s=parts.transfer_s,
        ssd_s=parts.ssd_s,
        prefill_s=parts.prefill_s,
        ttft_s=parts.ttft_s,
        num_running=member.num_running,
        num_outstanding_tokens=member.num_outstanding_tokens,
    )


def _decode_candidate(attempt: AttemptDecision, member: MemberState) -> control_pb2.Explanation.Candidate:
    asked, answer = attempt.asked, attempt.answer
    return control_pb2.Explanation.Candidate(
        id=member.id,
        chosen=isinstance(answer, Placement) and answer.decode.id == member.id,
        num_cached_blocks=cached_blocks(asked, member, attempt.seen.block_size),
        step_s=step_with(attempt.predictors, member, asked.num_tokens),
        num_running=member.num_running,
        num_outstanding_tokens=member.num_outstanding_tokens,
    )


def _predictions(
    attempt: AttemptDecision, answer: Placement, record: common_pb2.PhaseRecord | None
) -> list[control_pb2.Explanation.Prediction]:
    """record None: the attempt failed, or the request already had its first token."""
    asked, seen, predictors = attempt.asked, attempt.seen, attempt.predictors
    parts = prefill_forecast(predictors, asked, answer.prefill, answer.prefix, seen)
    predicted = {"queue": parts.queue_s, "transfer": parts.transfer_s, "prefill": parts.prefill_s}
    if parts.ssd_s:
        predicted["ssd"] = parts.ssd_s
    if not answer.is_local:
        num_bytes = handoff_bytes(predictors, asked, answer.decode, seen.block_size, answer.num_cached_tokens)
        predicted["handoff"] = predictors.handoff.predict(num_bytes, handoff_link(answer.prefill, answer.decode))
    if answer.ttft_s is not None:
        predicted["ttft"] = attempt.at_s + answer.ttft_s
    if answer.promised_ttft_s is not None:
        predicted["promised"] = attempt.at_s + answer.promised_ttft_s
    if answer.tpot_s is not None:
        predicted["tpot"] = answer.tpot_s
    measured = _measured(record) if record is not None else {}
    return [
        control_pb2.Explanation.Prediction(
            name=name, predicted_s=value, measured_s=measured.get(name, 0.0), measured=measured.get(name) is not None
        )
        for name, value in predicted.items()
    ]


def _measured(record: common_pb2.PhaseRecord) -> dict[str, float]:
    """The measured value of each predicted number, as far as there is one. Time that a step gives to others counts as queueing."""
    if record.ttft_s <= 0.0:
        return {}
    found = {"ssd": record.ssd_wait_s, "transfer": record.prefix_load_s - record.ssd_wait_s}
    found["ttft"] = found["promised"] = record.ttft_s
    if record.prefill_compute_s > 0.0:
        found["queue"] = record.prefill_queue_s + max(record.prefill_s - record.prefill_compute_s, 0.0)
        found["prefill"] = record.prefill_compute_s
        found["handoff"] = max(handoff_s(record), 0.0)
    if record.tpot_s > 0.0:
        found["tpot"] = record.tpot_s
    return found


def _finite(value_s: float) -> float:
    return value_s if math.isfinite(value_s) else 0.0
