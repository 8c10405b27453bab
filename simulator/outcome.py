"""What a run showed: a row a request, and the figures of all of them.

ttft     arrival -> first token. With a split it leaves through the decode instance, so waiting for room there is in it
tpot     mean of a request's token gaps, as the live proxy judges it
tbt      mean of the longest tenth of them (FAST'25, section 5.1)
in SLO   done, ttft and tpot (or, where asked for, tbt) both inside; a rejected request is outside
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..proxy.conductor.placement import Slo
from .cluster import Cluster
from .job import Job
from .scenario import Judge


class Row(NamedTuple):
    """Seconds, tokens; -1 where it did not come to that."""

    request: int  # its number, by arrival
    arrival_s: float
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    outcome: str
    reason: str
    prefill_instance: str
    decode_instance: str
    predicted_ttft_s: float
    promised_ttft_s: float
    prefill_start_s: float
    prefill_done_s: float
    ttft_s: float
    tbt_s: float
    tpot_s: float
    e2e_s: float
    prefill_cost_s: float
    wasted_prefill_s: float
    num_attempts: int


class Quantiles(NamedTuple):
    mean: float
    p50: float
    p90: float
    p99: float


class Result:
    """The outcome of a finished run. Rows in order of arrival."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        step_ends = {instance.name: np.asarray(instance.decode.step_ends) for instance in cluster.instances}
        self.rows = [_row(job, step_ends) for job in cluster.jobs]
        self._ttft = np.array([row.ttft_s for row in self.rows])
        self._tpot = np.array([row.tpot_s for row in self.rows])
        self._tbt = np.array([row.tbt_s for row in self.rows])
        self._done = np.array([row.outcome == "done" for row in self.rows])

    @property
    def num_requests(self) -> int:
        return len(self.rows)

    def num_rejected(self, where: str = "") -> int:
        return sum(row.outcome.startswith("rejected") and row.outcome.endswith(where) for row in self.rows)

    def num_in_slo(self, slo: Slo, judge: Judge = "tpot") -> int:
        paces = self._tpot if judge == "tpot" else self._tbt
        return int((self._done & (self._ttft <= slo.ttft_s) & (paces <= slo.tpot_s)).sum())

    def attainment(self, slo: Slo, judge: Judge = "tpot") -> float:
        return self.num_in_slo(slo, judge) / max(self.num_requests, 1)

    def quantiles(self, what: str) -> Quantiles:
        """Mean and percentiles of one figure over the requests that were served: "ttft_s", "tbt_s", "tpot_s" or "e2e_s"."""
        values = np.array([getattr(row, what) for row in self.rows if row.outcome == "done"])
        if not len(values):
            return Quantiles(math.nan, math.nan, math.nan, math.nan)
        return Quantiles(float(values.mean()), *(float(found) for found in np.percentile(values, [50, 90, 99])))

    @property
    def hit_tokens_ratio(self) -> float:
        """Share of the prefilled prompts' tokens that came from a cache."""
        asked = sum(row.num_input_tokens for row in self.rows if row.prefill_done_s >= 0)
        return sum(row.num_cached_tokens for row in self.rows if row.prefill_done_s >= 0) / max(asked, 1)

    @property
    def hit_blocks_ratio(self) -> float:
        """Share of the full blocks asked for that were found; a partial block does not count."""
        block_size = self.cluster.scenario.block_size
        asked = sum(row.num_input_tokens // block_size for row in self.rows if row.prefill_done_s >= 0)
        return sum(row.num_cached_tokens // block_size for row in self.rows if row.prefill_done_s >= 0) / max(asked, 1)

    @property
    def prefill_s_per_request(self) -> float:
        done = [row.prefill_cost_s for row in self.rows if row.prefill_done_s >= 0]
        return sum(done) / max(len(done), 1)

    @property
    def wasted_prefill_s(self) -> float:
        return sum(row.wasted_prefill_s for row in self.rows)

    def summary(self, slo: Slo) -> dict[str, float]:
        """Plain figures, for JSON and tables."""
        counters = self.cluster.counters
        found: dict[str, float] = {
            "num_requests": self.num_requests,
            "num_done": int(self._done.sum()),
            "num_rejected_at_arrival": self.num_rejected("at_arrival"),
            "num_rejected_at_decode": self.num_rejected("at_decode"),
            "num_in_slo": self.num_in_slo(slo),
            "attainment": self.attainment(slo),
            "attainment_by_tbt": self.attainment(slo, "tbt"),
            "hit_tokens_ratio": self.hit_tokens_ratio,
            "hit_blocks_ratio": self.hit_blocks_ratio,
            "prefill_s_per_request": self.prefill_s_per_request,
            "wasted_prefill_s": self.wasted_prefill_s,
            "handoff_gb": counters.handoff_bytes / 1e9,
            "prefix_gb": counters.prefix_bytes / 1e9,
            "ssd_gb": counters.ssd_bytes / 1e9,
            "num_role_changes": counters.num_role_changes,
            "num_preemptions": sum(instance.decode.batch.num_preempted for instance in self.cluster.instances),
            "num_steps": sum(instance.num_steps for instance in self.cluster.instances),
        }
        for what in ("ttft_s", "tbt_s", "tpot_s", "e2e_s"):
            for name, value in self.quantiles(what)._asdict().items():
                found[f"{what[:-2]}_{name}_s"] = value
        return found


def token_times(job: Job, step_ends: dict[str, np.ndarray]) -> np.ndarray:
    """When each of its tokens left, ascending."""
    runs = [step_ends[instance][first:end] for instance, first, end in job.token_runs]
    times = np.concatenate([np.asarray(job.starts), *runs])
    times.sort()
    return times


def longest_gaps_mean(times: np.ndarray) -> float:
    """Mean of the longest tenth (at least one) of the gaps; 0 where there is one token."""
    gaps = np.diff(times)
    if not len(gaps):
        return 0.0
    num_longest = math.ceil(len(gaps) / 10)
    return float(np.partition(gaps, len(gaps) - num_longest)[-num_longest:].mean())


def _row(job: Job, step_ends: dict[str, np.ndarray]) -> Row:
    arrival_s = job.request.arrival_s
    ttft_s = tbt_s = tpot_s = e2e_s = -1.0
    if job.outcome == "done":
        times = token_times(job, step_ends)
        ttft_s, e2e_s = job.first_token_s - arrival_s, job.done_s - arrival_s
        tbt_s = longest_gaps_mean(times)
        tpot_s = (times[-1] - times[0]) / max(len(times) - 1, 1)
    return Row(
        job.index, arrival_s, job.request.num_input_tokens, job.request.num_output_tokens, job.num_cached_tokens, job.outcome, job.reason,
        job.prefill_on, job.decode_on, job.predicted_ttft_s, job.promised_ttft_s,
        job.prefill_start_s, job.prefill_done_s, ttft_s, tbt_s, float(tpot_s), e2e_s, job.prefill_cost_s, job.wasted_prefill_s, job.attempt,
    )  # fmt: skip


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; the latter is 0 for a single value."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0
