"""What the predictors learn from in the live cluster, and how far off they were.

a hand-off admitted ─► prefill: its share of its steps' seconds · transfer: prefix bytes over their load · handoff: the rest of the TTFT
a decode worker's report ─► step: sequences, KV tokens, seconds of steps that decoded only; STEPS_PER_S of them in the whole cluster
                                └─► its error: a metric, always ─► learnt where the outlier_filter lets it pass

A prompt shares its steps with others, so that its wall time says what the worker was doing and not what the prompt cost. Workers therefore
report `compute_s`, each step's seconds divided by tokens: costs that add up to a queue.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable

from ...protocol.v1 import common_pb2, control_pb2
from ..conductor.predictors.outlier_filter import OutlierFilter
from ..conductor.predictors.timing import ErrorTrack, LinkTime, Predictors, PrefillTime, StepTime
from ..members.member import Member
from ..metrics import ProxyMetrics
from .phase_clock import handoff_s

NUM_UNSURE = 16  # observations, before which a profile or a guess may still be wrong as a whole
NUM_SMALL = 64  # new tokens, below which, or below an eighth of the largest seen, a prefill tells of what any one costs and not of the rest
STEPS_PER_S = 200.0  # samples of steps looked at, of all workers together
STEPS_AT_ONCE = 100.0  # after a pause
NUM_KNOWN = 3  # prefills learnt from, before the predictors are asked when there will be room


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
        """Whether its predictions are of this cluster, and not a guess or a profile alone."""
        return self.predictors.prefill.error.num_observations >= NUM_KNOWN

    def frozen(self) -> Predictors:
        """The predictors as they are now; one copy for all who ask between two observations."""
        if self._frozen is None:
            self._frozen = self.predictors.frozen()
        return self._frozen

    def prefilled(self, state: common_pb2.HandoffState, num_loads: int) -> None:
        """num_loads: other prefixes that the worker was to load meanwhile."""
        phases, predictors = state.phases, self.predictors
        if phases.compute_s > 0.0:
            new, prefix = state.num_tokens - state.num_cached_tokens, state.num_cached_tokens
            predicted_s = predictors.prefill.predict(new, prefix)
            self._most_new = max(self._most_new, new)
            telling = new >= max(NUM_SMALL, self._most_new / 8)
            self._note("prefill", predictors.prefill, (new, prefix), predicted_s, phases.compute_s, telling)
        if phases.num_bytes_loaded and phases.prefix_load_s > 0.0:
            num_bytes, link = phases.num_bytes_loaded, phases.load_transport
            predicted_s = predictors.transfer.predict(num_bytes, link, num_loads)
            self._note_link("transfer", predictors.transfer, num_bytes, link, num_loads, predicted_s, phases.prefix_load_s)

    def handed_off(self, record: common_pb2.PhaseRecord, num_bytes: int, link: str) -> None:
        """record: of a request that has its first token, through a hand-off. num_bytes: that were predicted to be pushed."""
        rest_s = handoff_s(record)
        if record.prefill_compute_s <= 0.0 or rest_s <= 0.0:
            return
        handoff = self.predictors.handoff
        self._note_link("handoff", handoff, num_bytes, link, 0, handoff.predict(num_bytes, link), rest_s)

    def reported(self, member: Member, load: control_pb2.MemberLoad) -> None:
        """A step that computed prompts beside its batch is not learnt from: which of the two took how long is not known.

        What it costs is bounded for the cluster as a whole: all samples of a small one are looked at, and of a large one some of each
        worker's. Which ones is drawn, for workers report in step with each other.
        """
        num_left = self._refill()
        if num_left < 1.0:
            return
        step, steps = self.predictors.step, load.steps
        samples = list(steps) if len(steps) <= num_left else self._rng.sample(steps, int(num_left))
        # not exactly one: a fixed price would meet the same workers again and again
        self._steps_left -= sum(self._rng.uniform(0.5, 1.5) for _ in samples)
        for sample in samples:
            num, tokens, seconds = sample.num_sequences, sample.num_kv_tokens, sample.seconds
            if num and not sample.num_prefill_tokens:
                self._note("step", step, (num, tokens), step.predict(num, tokens), seconds)

    def _refill(self) -> float:
        now_s = self._clock()
        self._steps_left = min(self._steps_left + (now_s - self._refilled_s) * STEPS_PER_S, STEPS_AT_ONCE)
        self._refilled_s = now_s
        return self._steps_left

    def _note(
        self,
        name: str,
        fit: PrefillTime | StepTime,
        features: tuple[int, int],
        predicted_s: float,
        measured_s: float,
        telling: bool = True,
    ) -> None:
        """telling: whether being far off speaks of the machine, and not of a constant that a large one hides."""
        outlier_filter = self._judged(name, "", predicted_s, measured_s, predicted_s)
        if outlier_filter is not None:
            if telling and self._is_new(fit.error, outlier_filter):
                fit.rescale(outlier_filter.level)
            fit.observe(*features, measured_s)

    def _note_link(
        self, name: str, fit: LinkTime, num_bytes: int, link: str, in_flight: int, predicted_s: float, measured_s: float
    ) -> None:
        outlier_filter = self._judged(name, link, predicted_s, measured_s, fit.fitted(num_bytes, link, in_flight))
        if outlier_filter is not None:
            if self._is_new(fit.error, outlier_filter):
                fit.rescale(outlier_filter.level, link)
            fit.observe(num_bytes, measured_s, link, in_flight)

    def _judged(self, name: str, kind: str, predicted_s: float, measured_s: float, fitted_s: float) -> OutlierFilter | None:
        """The outlier_filter that lets it pass, or None. fitted_s: what the fit itself has in its place."""
        self._metrics.predicted(name, predicted_s, measured_s)
        outlier_filter = self._filters[name + kind]
        if not outlier_filter.admits(fitted_s, measured_s):
            return None
        self._frozen = None
        return outlier_filter

    def _is_new(self, error: ErrorTrack, outlier_filter: OutlierFilter) -> bool:
        """Whether it is the beginning that is wrong, in everything: a fit of relative errors would take hundreds of observations
        to climb from a guess to a machine that is a hundred times slower."""
        return outlier_filter.level != 1.0 and error.num_observations < NUM_UNSURE
