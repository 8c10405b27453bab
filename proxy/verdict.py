"""Whether a request was served as it was promised: judged once, at its end, with its own bounds. Pure.

done ─► measured against each bound        failed, rejected ─► no bound was met        its client left ─► only by what was broken by then
What the client did wrong (400, 404 …) is not judged.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from ..protocol.errors import HalfmoonError, Overloaded
from ..protocol.v1 import common_pb2
from .conductor.placement import NO_SLO, Slo

SloClass = Literal["default", "own", "none"]
Miss = Literal["none", "ttft", "tpot", "both", "error", "rejected", "left", "invalid"]


class Terms(NamedTuple):
    """What a request was promised."""

    slo: Slo = NO_SLO
    slo_class: SloClass = "none"


class Verdict(NamedTuple):
    slo_class: SloClass
    in_slo: Literal["yes", "no", "unknown"]
    miss: Miss
    ttft_met: bool | None = None  # None: it had no such bound, or was not judged by it
    tpot_met: bool | None = None


def judge_done(terms: Terms, record: common_pb2.PhaseRecord, num_tokens: int) -> Verdict:
    """One without a token to wait for has met its bounds."""
    ttft_met = _met(terms.slo.ttft_s, record.ttft_s, num_tokens)
    tpot_met = _met(terms.slo.tpot_s, record.tpot_s, num_tokens)
    missed = (ttft_met is False, tpot_met is False)
    miss: Miss = "both" if all(missed) else "ttft" if missed[0] else "tpot" if missed[1] else "none"
    return Verdict(terms.slo_class, "no" if any(missed) else "yes", miss, ttft_met, tpot_met)


def judge_error(terms: Terms, error: HalfmoonError | None, *, rejected: bool) -> Verdict:
    """error: None for a bug."""
    if error is not None and error.http_status < 500 and not isinstance(error, Overloaded):
        return Verdict(terms.slo_class, "unknown", "invalid")
    ttft_met, tpot_met = (False if math.isfinite(limit_s) else None for limit_s in terms.slo)
    return Verdict(terms.slo_class, "no", "rejected" if rejected else "error", ttft_met, tpot_met)


def judge_left(terms: Terms, waited_s: float | None) -> Verdict:
    """waited_s: for the first token, in vain; None: it had come."""
    if waited_s is not None and waited_s > terms.slo.ttft_s:
        return Verdict(terms.slo_class, "no", "ttft", ttft_met=False)
    return Verdict(terms.slo_class, "unknown", "left")


def _met(limit_s: float, measured_s: float, num_tokens: int) -> bool | None:
    return num_tokens == 0 or measured_s <= limit_s if math.isfinite(limit_s) else None
