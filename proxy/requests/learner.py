"""Feeds the predictors with what the live cluster measures, and keeps how far off they were.

a hand-off admitted ─► prefill: its share of its steps' seconds · transfer: prefix bytes over their load · handoff: the rest of the TTFT
a decode worker's report ─► step: what steps decoded and computed beside it, and their seconds; STEPS_PER_S of them in the whole cluster
                                └─► its error: always a metric ─► learnt if the outlier filter admits it

A prompt shares its steps with others, so its wall time shows what the worker was doing and not what the prompt cost. Workers therefore
report `compute_s`: the seconds of each step, divided among its tokens. These costs add up to the time of a queue.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ...protocol.timing.step_cost import StepWork
from ...protocol.v1 import common_pb2, control_pb2
from ..conductor.placement import Placement
from ..conductor.predictors.outlier_filter import OutlierFilter
from ..conductor.predictors.timing import ErrorTrack, LinkTime, Predictors, PrefillTime, StepTime
from ..members.member import Member
from ..metrics import ProxyMetrics
from .phase_clock import handoff_s

NUM_UNSURE = 16  # observations; until then a profile or a guess may still be wrong by a constant factor
NUM_SMALL = 64  # new tokens; a smaller prefill, or one under an eighth of the largest, shows mostly the fixed cost
STEPS_PER_S = 200.0  # step samples looked at, of all workers together
STEPS_AT_ONCE = 100.0  # after a pause
NUM_KNOWN = 3  # prefills; the predictors are trusted with times to come back after so many


class Learner:
    """clock: in seconds, of any origin."""

    def __init__(self, predictors: Predictors, metrics: ProxyMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.predictors = predictors
        self._clock = clock
        self._rng = random.Random(0)
        self._steps_left = STEPS_AT_ONCE  # samples that may be looked at now
        self._refilled_s = clock()
        self._metrics = metrics
        self._filters: defaultdict[str, OutlierFilter] = defaultdict(OutlierFilter)  # by predictor and kind of link
        self._frozen: Predictors | None = None
        self._most_new = 0  # tokens of a prefill that was learnt from

    @property
    def knows(self) -> bool:
        """True once the predictions rest on this cluster and not on a guess or a profile alone."""
        return self.predictors.prefill.error.num_observations >= NUM_KNOWN

    def frozen(self) -> Predictors:
        """A copy of the predictors as they are now, shared by all callers between two observations."""
        if self._frozen is None:
            self._frozen = self.predictors.frozen()
        return self._frozen

    def arrived(self) -> None:
        """The predictors were told of an arrival: a copy from before does not have it."""
        self._frozen = None

    def prefilled(self, state: common_pb2.HandoffState, num_loads: int) -> None:
        """num_loads: other prefixes that the worker had to load at the same time."""
        phases, predictors = state.phases, self.predictors
        if phases.compute_s > 0.0:
            new, prefix = state.num_tokens - state.num_cached_tokens, state.num_cached_tokens
            predicted_s = predictors.prefill.predict(new, prefix)
            self._most_new = max(self._most_new, new)
            telling = new >= max(NUM_SMALL, self._most_new / 8)
            self._note("prefill", predictors.prefill, (new, prefix), predicted_s, phases.compute_s, telling)
        transfer_s = phases.prefix_load_s - phases.ssd_wait_s
        if phases.num_bytes_loaded and transfer_s > 0.0:
            num_bytes, link = phases.num_bytes_loaded, phases.load_transport
            predicted_s = predictors.transfer.predict(num_bytes, link, num_loads)
            self._note_link("transfer", predictors.transfer, num_bytes, link, num_loads, predicted_s, transfer_s)
        if phases.num_bytes_ssd:
            self.read_from_ssd(phases.ssd_store, phases.num_bytes_ssd, phases.ssd_wait_s)

    def read_from_ssd(self, store: str, num_bytes: int, seconds: float) -> None:
        """store: its address."""
        ssd = self.predictors.ssd
        outlier_filter = self._judged("ssd", store, ssd.predict(num_bytes, store), seconds, ssd.fitted(num_bytes, store))
        if outlier_filter is not None:
            if outlier_filter.level != 1.0:  # a disk is throttled, or no longer
                ssd.rescale(outlier_filter.level, store)
            ssd.observe(num_bytes, seconds, store)

    def first_token(self, record: common_pb2.PhaseRecord, placement: Placement) -> None:
        """It came, as predicted or not. One that was replayed says nothing."""
        if record.num_attempts == 1 and record.predicted_ttft_s > 0.0:
            self.predictors.promise.observe(placement.exposed_s, record.predicted_ttft_s, record.ttft_s)
            self._frozen = None

    def handed_off(self, record: common_pb2.PhaseRecord, num_bytes: float, link: str) -> None:
        """record: of a request that got its first token through a hand-off. num_bytes: the predicted bytes of the push."""
        rest_s = handoff_s(record)
        if record.prefill_compute_s <= 0.0 or rest_s <= 0.0:
            return
        handoff = self.predictors.handoff
        self._note_link("handoff", handoff, num_bytes, link, 0, handoff.predict(num_bytes, link), rest_s)

    def reported(self, member: Member, load: control_pb2.MemberLoad) -> None:
        """Learns from a worker's step samples. Steps that also computed prompts teach what both cost.

        The cost is bounded for the whole cluster. In a small cluster all samples are used, in a large one a random part of each
        worker's. The part is random because workers report in step with each other.
        """
        num_left = self._refill()
        if num_left < 1.0:
            return
        step, steps = self.predictors.step, load.steps
        samples = list(steps) if len(steps) <= num_left else self._rng.sample(steps, int(num_left))
        # not exactly one each: a fixed price would always favour the same workers
        self._steps_left -= sum(self._rng.uniform(0.5, 1.5) for _ in samples)
        for sample in samples:
            work = StepWork(sample.num_prefill_tokens, sample.prefill_attention, sample.num_sequences, sample.num_kv_tokens)
            if work.num_decodes:
                mixed = work.num_chunk_tokens > 0
                # far off in a mixed step may be either half: no reason to think the whole machine another
                self._note("step", step, (work,), step.cost.seconds(work), sample.seconds, not mixed, kind="mixed" if mixed else "")

    def _refill(self) -> float:
        now_s = self._clock()
        self._steps_left = min(self._steps_left + (now_s - self._refilled_s) * STEPS_PER_S, STEPS_AT_ONCE)
        self._refilled_s = now_s
        return self._steps_left

    def _note(
        self,
        name: str,
        fit: PrefillTime | StepTime,
        features: tuple[Any, ...],
        predicted_s: float,
        measured_s: float,
        telling: bool = True,
        kind: str = "",
    ) -> None:
        """telling: a large error would show the machine's speed, and not a fixed cost that large prefills hide."""
        outlier_filter = self._judged(name, kind, predicted_s, measured_s, predicted_s)
        if outlier_filter is not None:
            if telling and self._is_new(fit.error, outlier_filter):
                fit.rescale(outlier_filter.level)
            fit.observe(*features, measured_s=measured_s)

    def _note_link(
        self, name: str, fit: LinkTime, num_bytes: float, link: str, in_flight: int, predicted_s: float, measured_s: float
    ) -> None:
        outlier_filter = self._judged(name, link, predicted_s, measured_s, fit.fitted(num_bytes, link, in_flight))
        if outlier_filter is not None:
            if self._is_new(fit.error, outlier_filter):
                fit.rescale(outlier_filter.level, link)
            fit.observe(num_bytes, measured_s, link, in_flight)

    def _judged(self, name: str, kind: str, predicted_s: float, measured_s: float, fitted_s: float) -> OutlierFilter | None:
        """The outlier filter, if it admits the measurement, else None. fitted_s: the fit's own value for it."""
        self._metrics.predicted(name, predicted_s, measured_s)
        outlier_filter = self._filters[name + kind]
        if not outlier_filter.admits(fitted_s, measured_s):
            return None
        self._frozen = None
        return outlier_filter

    def _is_new(self, error: ErrorTrack, outlier_filter: OutlierFilter) -> bool:
        """True if the starting values are still wrong by a factor, so that the fit should be scaled as a whole.

        A fit of relative errors would need hundreds of observations to get from a guess to a machine a hundred times slower.
        """
        return outlier_filter.level != 1.0 and error.num_observations < NUM_UNSURE
