"""What every admission is: whether a request that has been placed may start. It sees predictions, never a clock.

An admission is one file of this folder and its line in ADMISSIONS. What it needs beside judge() it says itself, in flags.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from ..forecast import Forecast
from ..placement import NO_SLO, PlacementRequest, Rejection, Selection, Slo, Snapshot, come_back
from ..pool import Pool
from ..predictors.timing import Predictors


@dataclass(frozen=True, slots=True)
class Limits:
    """The SLO of requests that bring none."""

    slo: Slo = NO_SLO

    def of(self, request: PlacementRequest) -> Slo:
        return request.slo if request.slo is not None else self.slo


class Admission(ABC):
    __slots__ = ()
    name: ClassVar[str]
    checks_again: ClassVar[bool] = True
    """It is asked once more when the prefill is done. Where the answer is no then, the prefill is wasted."""
    wants_arrivals: ClassVar[bool] = False
    """Snapshots tell it what arrives at decode, and since when what runs there runs."""

    @classmethod
    @abstractmethod
    def create(cls, limits: Limits, predictors: Predictors) -> Self: ...

    @abstractmethod
    def judge(self, request: PlacementRequest, selection: Selection, forecast: Forecast, snapshot: Snapshot) -> Rejection | None:
        """None: it may start."""
        ...

    def observe_decode(self, seconds: float, num_tokens: int = 0) -> None:
        """A request with a prompt of num_tokens (0: not known) has decoded for so long."""
        return


def decode_role(snapshot: Snapshot) -> Pool:
    """Who takes new decodes: not those in the prefill role, where the pools hold members of several; everyone where nobody has it."""
    found = snapshot.decode.without_role("prefill")
    return found if len(found) else snapshot.decode


def over_ttft(predicted_s: float, slo: Slo) -> Rejection | None:
    if predicted_s <= slo.ttft_s:
        return None
    over_s = predicted_s - slo.ttft_s
    return Rejection(
        "overloaded",
        f"the first token is predicted in {predicted_s:.2f} s, the SLO is {slo.ttft_s:g} s; {come_back(over_s)}",
        over_s,
    )


def over_tpot(predicted_s: float, slo: Slo, retry_after_s: float, when: str) -> Rejection | None:
    if predicted_s <= slo.tpot_s:
        return None
    found = f"decode would step in {predicted_s * 1e3:.0f} ms {when}, the SLO is {slo.tpot_s * 1e3:g} ms"
    return Rejection("overloaded", f"{found}; {come_back(retry_after_s)}", retry_after_s)
