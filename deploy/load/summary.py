"""Summarises the samples of a window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...protocol.errors import ConfigError
from .sample import OUTCOMES, Sample

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


class Slo(NamedTuple):
    ttft_s: float
    tpot_s: float

    @classmethod
    def parse(cls, text: str) -> Slo:
        """ "2:0.02": TTFT within 2 s and a token every 20 ms. Raises ConfigError."""
        try:
            ttft_s, tpot_s = map(float, text.split(":"))
        except ValueError as error:
            raise ConfigError(f"{text!r} is no SLO; write seconds to the first token and seconds a token, as in 2:0.02") from error
        if not (ttft_s > 0 and tpot_s > 0):
            raise ConfigError(f"the SLO {text!r} can't be met; both of its numbers must be above 0")
        return cls(ttft_s, tpot_s)

    def __str__(self) -> str:
        return f"{self.ttft_s:g}s/{self.tpot_s * 1e3:g}ms"


def meets(sample: Sample, slo: Slo, *, tail: bool) -> bool:
    """tail: judges the mean of the longest tenth of gaps instead of the mean TPOT. An answer of one token has neither."""
    if sample.outcome != "ok" or sample.ttft_s is None:
        return False
    pace_s = sample.tail_itl_s if tail else sample.tpot_s
    return sample.ttft_s <= slo.ttft_s and (pace_s is None or pace_s <= slo.tpot_s)


def attainment(samples: Iterable[Sample], slo: Slo, *, tail: bool = False) -> float:
    """Share of the measured requests that met the SLO. Refused, failed and timed-out requests did not. Those that the client left on
    purpose don't count."""
    asked = [sample for sample in samples if sample.measured and sample.outcome != "cancelled"]
    return sum(meets(sample, slo, tail=tail) for sample in asked) / len(asked) if asked else 0.0


def summarise(samples: Sequence[Sample], slos: Sequence[Slo]) -> dict[str, Any]:
    """Figures of the measured requests, as plain values. Times are those of successful requests.

    Tokens and requests a second are taken over the time from sending the first measured request to the end of the last.
    """
    measured = [sample for sample in samples if sample.measured]
    good = [sample for sample in measured if sample.outcome == "ok"]
    span_s = _span(measured)
    num_prompt_tokens = sum(sample.prompt_tokens or sample.num_input_tokens for sample in good)
    num_output_tokens = sum(sample.num_tokens for sample in good)
    cached = [sample for sample in good if sample.cached_tokens is not None]
    outcomes = Counter(sample.outcome for sample in measured)
    return {
        "num_requests": len(measured),
        "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
        "errors": dict(Counter(sample.error for sample in measured if sample.outcome in ("error", "refused", "timed_out")).most_common(5)),
        "span_s": span_s,
        "requests_per_s": len(good) / span_s if span_s else 0.0,
        "output_tokens_per_s": num_output_tokens / span_s if span_s else 0.0,
        "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / span_s if span_s else 0.0,
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_output_tokens,
        "prefix_hit_ratio": _ratio(sum(one.cached_tokens or 0 for one in cached), sum(one.prompt_tokens or 0 for one in cached)),
        "ttft_s": spread(sample.ttft_s for sample in good),
        "tpot_s": spread(sample.tpot_s for sample in good),
        "itl_s": spread(gap for sample in good for gap in sample.gaps_s),
        "tail_itl_s": spread(sample.tail_itl_s for sample in good),
        "e2e_s": spread(sample.e2e_s for sample in good),
        "phases": _phases(good),
        "slos": [_judged(measured, slo, span_s) for slo in slos],
    }


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, quantiles (linear between neighbours) and maximum; None for no values."""
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(found):
        return None
    quantiles = np.quantile(found, list(QUANTILES.values()))
    return {"mean": float(found.mean()), **dict(zip(QUANTILES, map(float, quantiles), strict=True)), "max": float(found.max())}


def _judged(measured: Sequence[Sample], slo: Slo, span_s: float) -> dict[str, Any]:
    num_good = sum(meets(sample, slo, tail=False) for sample in measured)
    return {
        "ttft_s": slo.ttft_s,
        "tpot_s": slo.tpot_s,
        "attainment": attainment(measured, slo),
        "attainment_tail": attainment(measured, slo, tail=True),
        "good_requests_per_s": num_good / span_s if span_s else 0.0,
    }


def _span(measured: Sequence[Sample]) -> float:
    starts = [sample.due_s + sample.late_s for sample in measured]
    return max((start + sample.e2e_s for start, sample in zip(starts, measured, strict=True)), default=0.0) - min(starts, default=0.0)


def _phases(good: Sequence[Sample]) -> dict[str, dict[str, float] | None]:
    """Halfmoon's own record of the phases, and how much later than in that record the client got its first token."""
    records = [sample.phases for sample in good if sample.phases]
    names = [name for name, value in (records[0] if records else {}).items() if name.endswith("_s") and isinstance(value, int | float)]
    found = {name: spread(record.get(name) for record in records) for name in names}
    if "ttft_s" in found:
        told = [(sample.ttft_s, sample.phases) for sample in good if sample.ttft_s is not None and sample.phases]
        found["ttft_beyond_server_s"] = spread(ttft_s - record["ttft_s"] for ttft_s, record in told)
    return found


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
