"""Admissions by name: whether a placed request may start, by its SLO.

none · two_stage · ttft_tbt · early_rejection · predictive
"""

from __future__ import annotations

from ..placement import Slo
from ..predictors.timing import Predictors
from .base import Admission, Limits
from .early_rejection import EarlyRejection
from .predictive import Predictive
from .ttft_tbt import TtftTbt, TwoStage

__all__ = ["ADMISSIONS", "Admission", "EarlyRejection", "Limits", "Predictive", "TtftTbt", "TwoStage", "create_admission"]

ADMISSIONS = ("none", "two_stage", "ttft_tbt", "early_rejection", "predictive")


def create_admission(name: str, slo: Slo, predictors: Predictors) -> Admission | None:
    """slo: of requests that bring none. None for "none". Raises ValueError for a name not in ADMISSIONS."""
    limits = Limits(slo)
    if name == "none":
        return None
    if name == "two_stage":
        return TwoStage(limits)
    if name == "ttft_tbt":
        return TtftTbt(limits)
    if name == "early_rejection":
        return EarlyRejection(limits, predictors)
    if name == "predictive":
        return Predictive(limits, predictors)
    raise ValueError(f"no admission {name!r}; choose one of {', '.join(ADMISSIONS)}")
