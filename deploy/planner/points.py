"""A cost model fitted to a table of measured steps. CSV, a step a line; lines that begin with # are comments:

prompts,new_tokens,prefix_tokens,sequences,context_tokens,seconds
1,2048,8192,0,0,0.0593          a chunk of 2,048 tokens behind 8,192
0,0,0,32,65536,0.0069           a decode step of 32 sequences that have 65,536 tokens together
1,512,8192,16,160000,0.0242     a step that does both

seconds = (products^k + read^k)^(1/k) + attention + sequences + context,    products = prefill_s + tokens · per_token_s
Of degree 1 in its weights, so that it is a sum of weights times what it grows by with each: least squares in rounds, for each k.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...protocol.errors import ConfigError
from ...protocol.timing.step_cost import attention_of
from ...proxy.conductor.predictors.cost_model import CostModel
from ..profile_fit import non_negative

OVERLAPS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # k; tried in turn
NUM_ROUNDS = 6
SPREAD = 2.0  # largest by smallest size of chunks, or depth, from which on the points tell what depends on it
OPTIONAL = {"prompts": 1, "prefix_tokens": 0}  # what a column that is missing stands for
COUNTS = ("prompts", "new_tokens", "prefix_tokens", "sequences", "context_tokens")


class Point(NamedTuple):
    """One step. prompts chunks of new_tokens each, and a token of each of the sequences."""

    prompts: int
    new_tokens: int
    prefix_tokens: int
    sequences: int
    context_tokens: int
    seconds: float

    @property
    def num_chunk_tokens(self) -> int:
        return self.prompts * self.new_tokens

    def by(self, cost: CostModel) -> float:
        """Seconds by a cost model."""
        return cost.mixed_time([(self.new_tokens, self.prefix_tokens)] * self.prompts, self.sequences, self.context_tokens)


class Fit(NamedTuple):
    cost: CostModel
    median_error: float  # relative, of the points
    largest_error: float


def read_points(path: Path) -> list[Point]:
    """Raises ConfigError for a missing file, a missing column, and a line that is no step, with its number."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"no points at {path} ({error.strerror}); check --points") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise ConfigError(f"{path} is empty; it needs the columns {', '.join(Point._fields)}")
    header = [name.strip() for name in numbered[0][1].split(",")]
    missing = [name for name in Point._fields if name not in header and name not in OPTIONAL]
    if missing:
        raise ConfigError(f"{path}:{numbered[0][0]} lacks the column {missing[0]}; a table of points has {', '.join(Point._fields)}")
    return [_point(path, number, dict(zip(header, next(csv.reader([line])), strict=False))) for number, line in numbered[1:]]


def _point(path: Path, number: int, row: dict[str, str]) -> Point:
    try:
        counts = [int(float(row[name])) if name in row else OPTIONAL[name] for name in COUNTS]
        point = Point(*counts, seconds=float(row["seconds"]))
    except (KeyError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}:{number} is no step: {error}") from error
    if min(counts) < 0 or not 0 < point.seconds < 1e6 or not (point.num_chunk_tokens or point.sequences):
        raise ConfigError(f"{path}:{number} is no step: {point}; it needs tokens or sequences, and seconds above 0")
    return point


def fit_points(points: Sequence[Point], base: CostModel, source: str) -> Fit:
    """base: whose pages, links and layers are kept, and what the points don't tell: overlap where no step does both, and _kept().

    Raises ConfigError where the points can't tell the weights apart.
    """
    chunks = {(one.prompts, one.new_tokens, one.prefix_tokens) for one in points if one.num_chunk_tokens}
    batches = {(one.sequences, one.context_tokens) for one in points if one.sequences}
    if len(chunks) < 3 or len(batches) < 3:
        raise ConfigError(f"the points have {len(chunks)} different chunks and {len(batches)} different batches; a fit needs three of each")
    both = [one for one in points if one.num_chunk_tokens and one.sequences]
    best = min((_fit(points, base, overlap, source) for overlap in (OVERLAPS if both else (base.overlap,))), key=lambda found: found[1])
    errors = np.abs([one.by(best[0]) / one.seconds - 1.0 for one in points])
    return Fit(best[0], float(np.median(errors)), float(errors.max()))


def _fit(points: Sequence[Point], base: CostModel, overlap: float, source: str) -> tuple[CostModel, float]:
    """With the sum of squared errors of the logarithm."""
    cost = dataclasses.replace(base, overlap=overlap, source=source)
    kept = _kept(points)
    for _ in range(NUM_ROUNDS):
        features, measured = np.array([_features(one, cost) for one in points]), np.array([one.seconds for one in points])
        known = np.array(_weights(base))
        measured -= features[:, kept] @ known[kept]
        features[:, kept] = 0.0
        scale = np.maximum(features.max(axis=0), 1e-30)
        weights = non_negative(features / scale, np.maximum(measured, 1e-9)) / scale
        weights[kept] = known[kept]
        prefill_s, per_token_s, pair_s, step_s, per_sequence_s, per_kv_token_s = map(float, weights)
        cost = dataclasses.replace(
            cost, prefill_s=prefill_s, per_token_s=per_token_s, per_token_prefix_s=pair_s, per_token_squared_s=pair_s / 2, step_s=step_s,
            per_sequence_s=per_sequence_s, per_kv_token_s=per_kv_token_s,
        )  # fmt: skip
    errors = np.log([one.by(cost) / one.seconds for one in points])
    return cost, float((errors**2).sum())


def _weights(cost: CostModel) -> tuple[float, ...]:
    """As _features() has them."""
    return cost.prefill_s, cost.per_token_s, cost.per_token_prefix_s, cost.step_s, cost.per_sequence_s, cost.per_kv_token_s


def _kept(points: Sequence[Point]) -> list[int]:
    """Weights that these points can't tell from others: prefill_s where chunks are alike, attention where all stand equally deep."""
    sizes = [one.num_chunk_tokens for one in points if one.num_chunk_tokens]
    depths = [one.prefix_tokens + one.new_tokens / 2 for one in points if one.num_chunk_tokens]
    return [at for at, seen in ((0, sizes), (2, depths)) if max(seen) < SPREAD * min(seen)]


def _features(one: Point, cost: CostModel) -> tuple[float, ...]:
    """What the step's seconds grow by with prefill_s, per_token_s, a pair of attention, step_s, a sequence, a token of context."""
    num_tokens, products, read = one.num_chunk_tokens, float(bool(one.num_chunk_tokens)), float(not one.num_chunk_tokens)
    if num_tokens and one.sequences:
        products_s = max(cost.prefill_s + num_tokens * cost.per_token_s, 1e-12)
        together_s = cost.overlapped(products_s)
        power = cost.overlap - 1.0
        products, read = (products_s / together_s) ** power, (cost.step_s / together_s) ** power
    attention = one.prompts * attention_of(one.new_tokens, one.prefix_tokens)
    return products, products * num_tokens, attention, read, float(one.sequences), float(one.context_tokens)
