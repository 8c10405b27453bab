"""Fits a cost model to what a profile measured: least squares of relative errors, no weight below 0.

prefill   a + b·n + c·n·p + d·n²          step   a + b·sequences + c·KV tokens          each times slowdown(k busy workers, num_cores)
transfer  first byte + bytes / link       request   time to a first token without its prefill and its transfer
Short and long ones count the same, as in proxy/conductor/predictors/timing.py, which goes on from these weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..protocol.errors import ConfigError
from ..proxy.conductor.predictors.cost_model import CostModel

CORES_STRIDE = 0.05
NUM_ROUNDS = 5
Busy = tuple[tuple[int, float], ...]  # (workers that computed at the same time, this one included, share of the time)
ALONE: Busy = ((1, 1.0),)


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """A prefill that had its worker to itself."""

    num_new: int
    num_prefix: int
    seconds: float
    busy: Busy = ALONE


@dataclass(frozen=True, slots=True)
class StepPoint:
    """The mean step of a stretch of time in which a worker's batch stayed the same."""

    num_sequences: int
    num_kv_tokens: float
    seconds: float
    busy: Busy = ALONE


@dataclass(frozen=True, slots=True)
class RequestPoint:
    """What moved for a request that had the cluster to itself."""

    num_bytes_loaded: int  # of the cached prefix, from store to prefill worker
    load_s: float
    num_bytes_pushed: int
    handed_off_s: float  # the part of the hand-off that the prefill did not hide
    beside_s: float  # the part of the TTFT that was not prefill


@dataclass(frozen=True, slots=True)
class Points:
    prefill: Sequence[PrefillPoint]
    steps: Sequence[StepPoint]
    requests: Sequence[RequestPoint]

    def __add__(self, other: Points) -> Points:
        """The points of both, for two profiles of one cluster."""
        return Points([*self.prefill, *other.prefill], [*self.steps, *other.steps], [*self.requests, *other.requests])


@dataclass(frozen=True, slots=True)
class Facts:
    """What the cluster reports, so that it need not be measured."""

    name: str
    kv_bytes_per_token: int
    num_layers: int
    kv_capacity_tokens: int
    cache_tokens: int
    shares_cores: bool  # several workers compute on one machine's cores


def fit(points: Points, facts: Facts) -> CostModel:
    """Raises ConfigError if the points are too few to tell the weights apart."""
    _require_spread(points)
    num_cores = _num_cores(points) if facts.shares_cores else 0.0
    prefill, step = _prefill_weights(points.prefill, num_cores), _step_weights(points.steps, num_cores)
    link_bytes_per_s = _link(points.requests, facts.num_layers)
    hidden_bytes_per_s = link_bytes_per_s * facts.num_layers  # only the last layer leaves after the end of the prefill
    beside_s = [one.beside_s - one.num_bytes_pushed / hidden_bytes_per_s for one in points.requests]
    return CostModel(
        name=facts.name,
        prefill_s=prefill[0], per_token_s=prefill[1], per_token_prefix_s=prefill[2], per_token_squared_s=prefill[3],
        step_s=step[0], per_sequence_s=step[1], per_kv_token_s=step[2],
        kv_bytes_per_token=facts.kv_bytes_per_token, num_layers=facts.num_layers, kv_capacity_tokens=facts.kv_capacity_tokens,
        cache_tokens=facts.cache_tokens, link_bytes_per_s=link_bytes_per_s,
        request_s=max(float(np.median(beside_s)), 0.0), num_cores=num_cores,
    )  # fmt: skip


def slowdown(busy: Busy, num_cores: float) -> float:
    """How much longer work took beside others: with k busy workers on c cores, each runs at min(1, c / k) of its speed."""
    if num_cores <= 0:
        return 1.0
    return 1.0 / sum(share * min(1.0, num_cores / num_busy) for num_busy, share in busy)


def non_negative(features: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """The weights >= 0 with the least squares of relative errors, features @ weights against measured; [n, k] and [n] to [k].

    Errors are relative to the fitted values, which are found in rounds. If they were relative to the measured values, a measurement
    that is low by chance would count more than a high one, and the fit would lie below the mean.
    """
    unit = measured
    weights = np.zeros(features.shape[1])
    for _ in range(NUM_ROUNDS):
        weights = _non_negative(features / unit[:, None], measured / unit)
        unit = np.maximum(features @ weights, measured / 10)  # else a point whose fit is near 0 would count for all
    return weights


def _non_negative(features: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """The same for absolute errors. The optimum equals the unbounded optimum over the features that it uses, so all subsets are tried."""
    best, least = np.zeros(features.shape[1]), float("inf")
    for size in range(1, features.shape[1] + 1):
        for used in map(list, itertools.combinations(range(features.shape[1]), size)):
            found, *_ = np.linalg.lstsq(features[:, used], measured, rcond=None)
            error = float(((features[:, used] @ found - measured) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(features.shape[1]), error
                best[used] = found
    return best


def predicted_prefill(model: CostModel, point: PrefillPoint) -> float:
    """Seconds by the model."""
    return model.prefill_time(point.num_new, point.num_prefix) * slowdown(point.busy, model.num_cores)


def predicted_step(model: CostModel, point: StepPoint) -> float:
    step_s = model.step_s + point.num_sequences * model.per_sequence_s + point.num_kv_tokens * model.per_kv_token_s
    return step_s * slowdown(point.busy, model.num_cores)


def _weights(points: Sequence[Any], row: Callable[[Any], tuple[float, ...]], num_cores: float) -> tuple[np.ndarray, float]:
    """The weights, and the sum of squared errors of the logarithm, in which half and double are equally far off."""
    features = np.array([[feature * slowdown(point.busy, num_cores) for feature in row(point)] for point in points])
    measured = np.array([point.seconds for point in points])
    scale = features.max(axis=0)  # lstsq drops what is far below the largest
    scale[scale == 0] = 1.0
    weights = non_negative(features / scale, measured) / scale
    return weights, float((np.log(features @ weights / measured) ** 2).sum())


def _prefill_row(point: PrefillPoint) -> tuple[float, ...]:
    return 1.0, point.num_new, point.num_new * point.num_prefix, point.num_new**2


def _step_row(point: StepPoint) -> tuple[float, ...]:
    return 1.0, point.num_sequences, point.num_kv_tokens


def _prefill_weights(points: Sequence[PrefillPoint], num_cores: float) -> list[float]:
    return [float(weight) for weight in _weights(points, _prefill_row, num_cores)[0]]


def _step_weights(points: Sequence[StepPoint], num_cores: float) -> list[float]:
    return [float(weight) for weight in _weights(points, _step_row, num_cores)[0]]


def _num_cores(points: Points) -> float:
    """The number of cores with which all points fit best. 0, for no limit, if the busy workers did not slow each other down."""
    most = max(num_busy for point in (*points.prefill, *points.steps) for num_busy, _ in point.busy)

    def error(num_cores: float) -> float:
        return _weights(points.prefill, _prefill_row, num_cores)[1] + _weights(points.steps, _step_row, num_cores)[1]

    tried = [most] if most <= 1 else [*np.arange(1.0, most, CORES_STRIDE), float(most)]
    best = min(tried, key=error)
    return 0.0 if best >= most else float(best)


def _link(points: Sequence[RequestPoint], num_layers: int) -> float:
    """Bytes a second of loaded prefixes and of hand-offs' last layers. A link too fast to measure counts as the fastest one measured."""
    loads = [(1.0, 0.0, one.num_bytes_loaded, one.load_s) for one in points if one.num_bytes_loaded and one.load_s > 0]
    pushes = [
        (0.0, 1.0, one.num_bytes_pushed / num_layers, one.handed_off_s) for one in points if one.num_bytes_pushed and one.handed_off_s > 0
    ]
    rows = np.array(loads + pushes)
    scale = rows[:, 2].max()
    weights = non_negative(rows[:, :3] / (1.0, 1.0, scale), rows[:, 3])
    per_byte_s = weights[2] / scale
    return float(1.0 / per_byte_s if per_byte_s > 0 else (rows[:, 2] / rows[:, 3]).max())


def _require_spread(points: Points) -> None:
    lengths = {point.num_new for point in points.prefill}
    prefixes = {point.num_prefix for point in points.prefill}
    batches = {point.num_sequences for point in points.steps}
    if len(lengths) < 3 or len(prefixes) < 2 or len(batches) < 2 or not any(one.num_bytes_pushed for one in points.requests):
        raise ConfigError(
            f"measured {len(lengths)} prompt lengths, {len(prefixes)} prefixes, {len(batches)} batch sizes and "
            f"{sum(one.num_bytes_pushed > 0 for one in points.requests)} hand-offs in the time; a cost model needs 3, 2, 2 and 1: "
            "give --seconds more"
        )
