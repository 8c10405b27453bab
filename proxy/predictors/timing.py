"""How long a prefill, a decode step and a transfer will take: fitted online from what workers report.

CostModel (a profile, a guess) ──► Predictors ──predict──► Conductor
                                        ▲
                phase records ──observe─┘  each keeps its own error, relative and recent
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .cost_model import CostModel
from .regression import RecursiveLeastSquares

KI = 1024.0
ERROR_WINDOW = 0.02  # weight of the newest relative error in the mean
NOISE = 0.05  # of one measurement, relative
DOUBT = 1.0  # of a profile's weight, relative
TRIFLE = 0.02  # of its largest weight: what a weight that the profile has at 0 may be
MILLI = 1e-3  # milliseconds inside


class RelativeFit:
    """Least squares of relative errors: a short prefill counts as much as a long one. A profile's weights are its beginning."""

    def __init__(self, weights: list[float]) -> None:
        least = max(TRIFLE * max(abs(weight) for weight in weights), 1e-6)
        self._fit = RecursiveLeastSquares(weights, [(DOUBT * max(abs(weight), least) / NOISE) ** 2 for weight in weights])

    @property
    def weights(self) -> list[float]:
        return self._fit.weights

    def predict(self, features: tuple[float, ...]) -> float:
        return self._fit.predict(features)

    def observe(self, features: tuple[float, ...], measured: float) -> float:
        """Returns measured - predicted, as it was before."""
        unit = max(measured, 1e-6)
        return self._fit.observe([feature / unit for feature in features], measured / unit) * unit


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

    def tokens_within(self, seconds: float, num_prefix: int) -> int:
        """How many new tokens behind num_prefix are computed in that time; 0 where not one is."""
        left = seconds - self.base_s
        linear, square = self.per_token_s + num_prefix * self.per_token_prefix_s, self.per_token_squared_s
        if left <= 0.0 or linear <= 0.0:
            return 0
        if square <= 0.0:
            return int(left / linear)
        return int(((linear * linear + 4.0 * square * left) ** 0.5 - linear) / (2.0 * square))

    def _refresh(self) -> None:
        constant, linear, mixed, square = self._fit.weights
        self.base_s = constant * MILLI
        self.per_token_s = linear * MILLI / KI
        self.per_token_prefix_s = mixed * MILLI / KI**2
        self.per_token_squared_s = square * MILLI / KI**2


class StepTime:
    """a + b·sequences + c·KV tokens, of one decode step."""

    def __init__(self, model: CostModel) -> None:
        self.error = ErrorTrack()
        self._fit = RelativeFit([model.step_s / MILLI, model.per_sequence_s * 10 / MILLI, model.per_kv_token_s * 100 * KI / MILLI])
        self._refresh()

    def predict(self, num_sequences: float, num_kv_tokens: float) -> float:
        """Seconds."""
        return self.base_s + num_sequences * self.per_sequence_s + num_kv_tokens * self.per_kv_token_s

    def observe(self, num_sequences: int, num_kv_tokens: int, measured_s: float) -> None:
        error_ms = self._fit.observe((1.0, num_sequences / 10, num_kv_tokens / (100 * KI)), measured_s / MILLI)
        self.error.note(error_ms * MILLI, measured_s)
        self._refresh()

    def _refresh(self) -> None:
        constant, sequences, tokens = self._fit.weights
        self.base_s = constant * MILLI
        self.per_sequence_s = sequences * MILLI / 10
        self.per_kv_token_s = tokens * MILLI / (100 * KI)


class TransferTime:
    """a + b·bytes + c·bytes·in_flight for each kind of link ("shm", "grpc", …); in_flight: transfers that share it."""

    def __init__(self, model: CostModel) -> None:
        self.error = ErrorTrack()
        self._per_gib_s = 2**30 / model.link_bytes_per_s
        self._fits: dict[str, RelativeFit] = {}

    def predict(self, num_bytes: float, link: str = "", in_flight: int = 0) -> float:
        """Seconds. A link never seen before counts as the cost model's, shared fairly."""
        gib = num_bytes / 2**30
        fit = self._fits.get(link)
        if fit is None:
            return gib * self._per_gib_s * (1 + in_flight)
        return max(fit.predict((1.0, gib, gib * in_flight)) * MILLI, 0.0)

    def observe(self, num_bytes: float, measured_s: float, link: str = "", in_flight: int = 0) -> None:
        fit = self._fits.get(link)
        if fit is None:
            each_ms = self._per_gib_s / MILLI
            fit = self._fits[link] = RelativeFit([0.0, each_ms, each_ms])
        gib = num_bytes / 2**30
        self.error.note(fit.observe((1.0, gib, gib * in_flight), measured_s / MILLI) * MILLI, measured_s)


@dataclass(slots=True)
class Predictors:
    """What the Conductor knows of time. One object, shared by policy, admission and the order of queues."""

    model: CostModel
    prefill: PrefillTime = field(init=False)
    step: StepTime = field(init=False)
    transfer: TransferTime = field(init=False)

    @classmethod
    def guess(cls) -> Predictors:
        """For a cluster that nobody has profiled yet: some machine, until observations say which."""
        model = CostModel(
            name="guess", per_token_s=1e-4, per_token_prefix_s=1e-9, per_token_squared_s=5e-10, step_s=0.02, per_sequence_s=2e-4,
            per_kv_token_s=5e-8, kv_bytes_per_token=2**17, kv_capacity_tokens=2**20, cache_tokens=2**20, link_bytes_per_s=5e9,
        )  # fmt: skip
        return cls(model)

    def __post_init__(self) -> None:
        self.prefill, self.step, self.transfer = PrefillTime(self.model), StepTime(self.model), TransferTime(self.model)
