"""How long a prefill, a decode step and a transfer will take: fitted online from what workers report.

CostModel (a profile, a guess) ──► Predictors ──predict──► Conductor
                                        ▲
                phase records ──observe─┘  each keeps its own error, relative and recent
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from ....protocol.timing.regression import FORGETTING, RelativeFit
from ....protocol.timing.step_cost import StepWork
from ....protocol.timing.step_fit import StepFit
from ..pool import Floats, Ints
from .cost_model import CostModel
from .passing import Passing
from .promise import Promise

KI = 1024.0
ERROR_WINDOW = 0.02  # weight of the newest relative error in the mean
MILLI = 1e-3  # milliseconds inside
OWN_LINK = "shm"
Link = TypeVar("Link", bound="LinkTime")


class ErrorTrack:
    """Exponential mean of |predicted - measured| / measured."""

    def __init__(self) -> None:
        self.mean_relative = 0.0
        self.num_observations = 0

    def note(self, error_s: float, measured_s: float) -> None:
        relative = abs(error_s) / max(measured_s, 1e-9)
        self.num_observations += 1
        weight = max(ERROR_WINDOW, 1.0 / self.num_observations)
        self.mean_relative += weight * (relative - self.mean_relative)


class PrefillTime:
    """a + b·n + c·n·p + d·n², n new tokens behind a prefix of p."""

    def __init__(self, model: CostModel) -> None:
        self.error = ErrorTrack()
        self._fit = RelativeFit(
            [
                model.prefill_s / MILLI,
                model.per_token_s * KI / MILLI,
                model.per_token_prefix_s * KI**2 / MILLI,
                model.per_token_squared_s * KI**2 / MILLI,
            ]
        )
        self._refresh()

    def predict(self, num_new: int, num_prefix: int) -> float:
        """Seconds."""
        found = self.base_s + num_new * (self.per_token_s + num_prefix * self.per_token_prefix_s + num_new * self.per_token_squared_s)
        return found if found > 0.0 else 0.0

    def observe(self, num_new: int, num_prefix: int, measured_s: float) -> None:
        new, prefix = num_new / KI, num_prefix / KI
        error_ms = self._fit.observe((1.0, new, new * prefix, new * new), measured_s / MILLI)
        self.error.note(error_ms * MILLI, measured_s)
        self._refresh()

    def rescale(self, factor: float) -> None:
        """The machine is so many times slower than was thought, in everything: the shape of the profile stays, what was learnt goes."""
        self._fit = RelativeFit([weight * factor for weight in self._fit.weights])
        self._refresh()

    def _refresh(self) -> None:
        constant, linear, mixed, square = self._fit.weights
        self.base_s = constant * MILLI
        self.per_token_s = linear * MILLI / KI
        self.per_token_prefix_s = mixed * MILLI / KI**2
        self.per_token_squared_s = square * MILLI / KI**2


class StepTime:
    """a + b·sequences + c·KV tokens, of one decode step; and as StepCost what a prompt's chunk beside it costs."""

    def __init__(self, model: CostModel) -> None:
        self.error = ErrorTrack()
        self._fit = StepFit(model.step_cost)
        self._refresh()

    def predict(self, num_sequences: float, num_kv_tokens: float) -> float:
        """Seconds."""
        return self.base_s + num_sequences * self.per_sequence_s + num_kv_tokens * self.per_kv_token_s

    def predict_all(self, num_sequences: Ints, num_kv_tokens: Ints) -> Floats:
        """The same for many workers at once, added up in the same order."""
        return self.base_s + num_sequences * self.per_sequence_s + num_kv_tokens * self.per_kv_token_s

    def observe(self, work: StepWork, measured_s: float) -> None:
        """A step with or without a prompt in it."""
        self.error.note(measured_s - self.cost.seconds(work), measured_s)
        self._fit.observe(work, measured_s)
        self._refresh()

    def rescale(self, factor: float) -> None:
        """As PrefillTime's."""
        self._fit = StepFit(self.cost.scaled(factor))
        self._refresh()

    def _refresh(self) -> None:
        self.cost = self._fit.cost
        self.base_s, self.per_sequence_s, self.per_kv_token_s = self.cost.read_s, self.cost.per_decode_s, self.cost.per_context_s


class LinkTime:
    """a + b·bytes + c·bytes·in_flight for each kind of link; in_flight: transfers that share it."""

    forgetting: ClassVar[float] = FORGETTING

    def __init__(self, model: CostModel) -> None:
        self.error = ErrorTrack()
        self._per_gib_s = 2**30 / model.link_bytes_per_s
        self._fits: dict[str, RelativeFit] = {}
        self._weights: dict[str, list[float]] = {}  # replaced, never changed, by an observation: a frozen copy keeps its own

    def observe(self, num_bytes: float, measured_s: float, link: str = "", in_flight: int = 0) -> None:
        fit = self._fits.get(link)
        if fit is None:
            fit = self._fits[link] = RelativeFit(self._first_weights(), forgetting=self.forgetting)
        gib = num_bytes / 2**30
        self.error.note(fit.observe((1.0, gib, gib * in_flight), measured_s / MILLI) * MILLI, measured_s)
        self._weights[link] = fit.weights

    def fitted(self, num_bytes: float, link: str, in_flight: int = 0) -> float:
        """Seconds, by the fit alone: where it begins, of a kind never seen."""
        return _seconds(self._weights.get(link) or self._first_weights(), num_bytes, in_flight)

    def rescale(self, factor: float, link: str = "") -> None:
        """As PrefillTime's, of one kind of link."""
        weights = self._weights.get(link) or self._first_weights()
        fit = self._fits[link] = RelativeFit([weight * factor for weight in weights], forgetting=self.forgetting)
        self._weights[link] = fit.weights

    def frozen(self: Link) -> Link:
        found = copy.copy(self)
        found._weights = dict(self._weights)
        return found

    def _first_weights(self) -> list[float]:
        raise NotImplementedError

    def _seen(self, num_bytes: float, link: str, in_flight: int) -> float | None:
        """None for a link never seen."""
        weights = self._weights.get(link)
        return None if weights is None else _seconds(weights, num_bytes, in_flight)


def _seconds(weights: list[float], num_bytes: float, in_flight: int) -> float:
    gib = num_bytes / 2**30
    return max((weights[0] + gib * (weights[1] + weights[2] * in_flight)) * MILLI, 0.0)


class TransferTime(LinkTime):
    """Of a prefix to a prefill worker, in bytes. Kinds: "shm", "grpc", …"""

    def __init__(self, model: CostModel) -> None:
        super().__init__(model)
        self.default_link = ""  # that a prediction is for where it does not say

    def predict(self, num_bytes: float, link: str = "", in_flight: int = 0) -> float:
        """Seconds. A link never seen before counts as the cost model's, shared fairly; nothing to move takes no time."""
        if num_bytes <= 0.0:
            return 0.0
        found = self._seen(num_bytes, link or self.default_link, in_flight)
        return num_bytes / 2**30 * self._per_gib_s * (1 + in_flight) if found is None else found

    def own(self, num_bytes: float) -> float:
        """Seconds, of a prefix that the store on the worker's node holds. It counts as nothing until one was seen."""
        return self._seen(num_bytes, OWN_LINK, 0) or 0.0 if num_bytes > 0.0 else 0.0

    def _first_weights(self) -> list[float]:
        each_ms = self._per_gib_s / MILLI
        return [0.0, each_ms, each_ms]


class SsdTime(LinkTime):
    """Of blocks from a store's SSD into its DRAM, in bytes. Kinds: the stores' addresses, for each has a disk of its own."""

    forgetting: ClassVar[float] = 0.9  # a disk's rate changes: credits run out, others use it

    def __init__(self, model: CostModel) -> None:
        super().__init__(model)
        self._per_gib_s = 2**30 / model.ssd_bytes_per_s

    def predict(self, num_bytes: float, store: str) -> float:
        """Seconds. Of a store that was never seen: as of the others, or the cost model's."""
        if num_bytes <= 0.0:
            return 0.0
        if (found := self._seen(num_bytes, store, 0)) is not None:
            return found
        if self._weights:
            return statistics.median(_seconds(weights, num_bytes, 0) for weights in self._weights.values())
        return self.fitted(num_bytes, store)

    def _first_weights(self) -> list[float]:
        return [0.0, self._per_gib_s / MILLI, 0.0]


class HandoffTime(LinkTime):
    """What of a first token's time is neither queue nor prefix nor prefill: calls, the decode step under way, and the hand-off's bytes.

    Bytes: those that the prefill does not hide (unhidden). Kinds: "node" where both workers are on one, "net".
    """

    def __init__(self, model: CostModel) -> None:
        super().__init__(model)
        self._request_s = model.request_s
        self._num_layers = model.num_layers

    def predict(self, num_bytes: float, link: str) -> float:
        """Seconds. Of a kind never seen before it is the cost model's for any request."""
        found = self._seen(num_bytes, link, 0)
        return self._request_s if found is None else found

    def unhidden(self, num_bytes: float, prefill_s: float) -> float:
        """Of a hand-off's bytes. Layers leave under the prefill, but for the last, and a long prefix takes longer than it."""
        return max(num_bytes - prefill_s / self._per_gib_s * 2**30, num_bytes / self._num_layers)

    def _first_weights(self) -> list[float]:
        return [max(self._request_s / MILLI, 1.0), self._per_gib_s / MILLI, 0.0]


@dataclass(slots=True)
class Predictors:
    """What the Conductor knows of time. One object, shared by policy, admission and the order of queues."""

    model: CostModel
    prefill: PrefillTime = field(init=False)
    step: StepTime = field(init=False)
    transfer: TransferTime = field(init=False)
    ssd: SsdTime = field(init=False)
    handoff: HandoffTime = field(init=False)
    passing: Passing = field(init=False)
    promise: Promise = field(init=False)

    @classmethod
    def guess(cls) -> Predictors:
        """For a cluster that nobody has profiled yet: some machine, until observations say which."""
        model = CostModel(
            name="guess", per_token_s=1e-4, per_token_prefix_s=1e-9, per_token_squared_s=5e-10, step_s=0.02, per_sequence_s=2e-4,
            per_kv_token_s=5e-8, kv_bytes_per_token=2**17, kv_capacity_tokens=2**20, cache_tokens=2**20, link_bytes_per_s=5e9,
        )  # fmt: skip
        return cls(model)

    def __post_init__(self) -> None:
        self.prefill, self.step = PrefillTime(self.model), StepTime(self.model)
        self.transfer, self.ssd, self.handoff = TransferTime(self.model), SsdTime(self.model), HandoffTime(self.model)
        self.passing, self.promise = Passing(), Promise()

    def frozen(self) -> Predictors:
        """As they are now: a copy that predicts the same whatever is observed later. It observes nothing itself."""
        found = copy.copy(self)
        found.prefill, found.step = copy.copy(self.prefill), copy.copy(self.step)
        found.transfer, found.ssd, found.handoff = self.transfer.frozen(), self.ssd.frozen(), self.handoff.frozen()
        found.passing, found.promise = self.passing.frozen(), self.promise.frozen()
        return found
