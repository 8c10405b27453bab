"""Predicted seconds: of a prefill, of a decode step, of a transfer."""

from ....protocol.timing.regression import RecursiveLeastSquares
from .cost_model import CostModel
from .timing import HandoffTime, Predictors, PrefillTime, StepTime, TransferTime
from .waiting import queue_s, step_with

__all__ = [
    "CostModel",
    "HandoffTime",
    "Predictors",
    "PrefillTime",
    "RecursiveLeastSquares",
    "StepTime",
    "TransferTime",
    "queue_s",
    "step_with",
]
