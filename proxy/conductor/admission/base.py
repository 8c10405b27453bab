"""What every admission is: whether a request that has been placed may start. It sees predictions, never a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..forecast import Forecast
from ..placement import NO_SLO, Choice, MemberState, PlacementRequest, Rejection, Slo, Snapshot, come_back


class Admission(Protocol):
    name: ClassVar[str]
    checks_again: ClassVar[bool]
    """Whether the decode worker asks once more when the prefill is done; its work is wasted where the answer is no."""

    def judge(self, request: PlacementRequest, choice: Choice, forecast: Forecast, snapshot: Snapshot) -> Rejection | None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The SLO of requests that bring none."""

    slo: Slo = NO_SLO

    def of(self, request: PlacementRequest) -> Slo:
        return request.slo if request.slo is not None else self.slo


def decode_role(snapshot: Snapshot) -> list[MemberState]:
    """Who takes new decodes: not those in the prefill role, where the pools hold members of several; everyone where nobody has it."""
    return [member for member in snapshot.decode if member.role != "prefill"] or list(snapshot.decode)


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
