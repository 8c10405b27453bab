"""Admissions by name: whether a placed request may start, by its SLO. "none" asks nobody."""

from __future__ import annotations

from ..placement import Slo
from ..predictors.timing import Predictors
from .base import Admission, Limits
from .early_rejection import EarlyRejection
from .predictive import Predictive
from .ttft_tbt import TtftTbt, TwoStage

__all__ = ["ADMISSIONS", "Admission", "EarlyRejection", "Limits", "Predictive", "TtftTbt", "TwoStage", "create_admission"]

ADMISSIONS: dict[str, type[Admission] | None] = {
    "none": None,
    **{admission.name: admission for admission in (TwoStage, TtftTbt, EarlyRejection, Predictive)},
}


def create_admission(name: str, slo: Slo, predictors: Predictors) -> Admission | None:
    """slo: of requests that bring none. None for "none". Raises ValueError for a name not in ADMISSIONS."""
    if name not in ADMISSIONS:
        raise ValueError(f"no admission {name!r}; choose one of {', '.join(ADMISSIONS)}")
    admission = ADMISSIONS[name]
    return None if admission is None else admission.create(Limits(slo), predictors)
