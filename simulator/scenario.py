"""What is simulated: instances, policy, admission, SLO, caches. One frozen value, which with a replay gives one result."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..protocol.errors import ConfigError
from ..proxy.conductor.placement import Slo
from ..proxy.conductor.policies import policy_type
from ..proxy.conductor.predictors.cost_model import CostModel
from ..proxy.conductor.queue_order import Order
from .trace import BLOCK_SIZE

PAPER_SLO = Slo(30.0, 0.1)  # the SLO of Mooncake's papers
COST_MODELS = Path(__file__).parent / "cost_models"


Judge = Literal["tpot", "tbt"]
"""Which pace the SLO's second number bounds: a request's mean gap, or the mean of its longest tenth."""


@dataclass(frozen=True, slots=True)
class Failure:
    at_s: float
    instance: str
    down_s: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Failure:
        """TIME:INSTANCE[:DOWN_S], seconds: "600:n0003:60". Raises ConfigError."""
        at_s, _, rest = text.partition(":")
        instance, _, down_s = rest.partition(":")
        try:
            found = cls(float(at_s), instance, float(down_s) if down_s else math.inf)
        except ValueError as error:
            raise ConfigError(f"{text!r} is no failure: {error}; give TIME:INSTANCE[:DOWN_S], as in 600:n0003:60") from error
        if not instance or not 0.0 <= found.at_s < math.inf or not found.down_s > 0.0:
            raise ConfigError(f"{text!r} is no failure; give TIME:INSTANCE[:DOWN_S], as in 600:n0003:60, both times in seconds")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    cost: CostModel
    num_prefill: int = 8
    num_decode: int = 8
    coupled: bool = False
    """All instances prefill and decode, chunked: the baseline. The two numbers are added up."""
    policy: str = "kvcache_centric"
    admission: str = "none"
    slo: Slo = PAPER_SLO
    judge: Judge = "tpot"
    """What the SLO bounds beside the first token: a request's mean gap, as live, or the mean of its longest tenth, as in the papers."""
    order: Order | Literal["fair"] = "short"
    """Order of the prefill queues. fair: as in the worker, which shares a step's budget between prompts."""
    balancing_threshold: float = 1.0
    remote_prefix: bool = True
    """Prefixes are fetched from other nodes' stores; without, each node has its own cache only."""
    cache_on_decode: bool = False
    """Blocks of a hand-off stay in the decode node's store too."""
    eviction: str = "lru"
    one_node: bool = False
    """All instances stand on one machine: one store, and they share the cost model's num_cores."""
    block_size: int = BLOCK_SIZE
    """Tokens that a request's block id stands for."""
    page_size: int = 128
    max_tokens_per_step: int = 2048
    chunk_tokens: int = 0
    """Prompt tokens in a step that also decodes; 0: as many as the TPOT allows."""
    tpot_target_s: float = 0.05
    """What chunks are sized by where the SLO has no TPOT."""
    max_running: int = 512
    learn: bool = False
    """Predictors are fitted to what the run shows; without, they are the cost model's formulas."""
    knows: CostModel | None = None
    """What the predictors begin with; None: the cost model itself."""
    rebalance_s: float = 1.0
    """Between two questions for role changes (policies that have them)."""
    role_change_s: float = 0.05
    """From the decision until the worker has the new role: the order, its answer, and the news to the proxy."""
    report_s: float = 0.0
    """Age that what is known of an instance may have where nothing was placed on it since; 0: the snapshot is exact."""
    step_jitter: float = 0.0
    """Deviation of the logarithm of a step's seconds: 0.05 lets two steps in three be within 5 % of the cost model's."""
    failures: tuple[Failure, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prefill < 0 or self.num_decode < 0 or self.num_prefill + self.num_decode < 1:
            raise ConfigError(f"{self.num_prefill} prefill and {self.num_decode} decode instances; there must be one at least")
        if not self.coupled and not self.flexible and (self.num_prefill < 1 or self.num_decode < 1):
            raise ConfigError(f"{self.num_prefill} prefill and {self.num_decode} decode instances; a split needs one of each")

    @property
    def num_instances(self) -> int:
        return self.num_prefill + self.num_decode

    @property
    def flexible(self) -> bool:
        """Instances change roles."""
        return policy_type(self.policy).plans_roles and not self.coupled

    @property
    def title(self) -> str:
        if self.coupled:
            return f"{self.num_instances} coupled, chunk {self.chunk_tokens or 'sized'}, {self.policy}"
        if self.flexible:
            return f"{self.num_instances} {self.policy}"
        return f"{self.num_prefill}P{self.num_decode}D, {self.policy}"

    def with_(self, **changes: Any) -> Scenario:
        return dataclasses.replace(self, **changes)


def find_cost_model(name: str) -> CostModel:
    """A shipped one by name ("a800-70b") or a file. Raises ConfigError naming those shipped."""
    shipped = COST_MODELS / f"{name}.yaml"
    if shipped.is_file():
        return CostModel.load(shipped)
    path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in COST_MODELS.glob("*.yaml")))
        raise ConfigError(f"no cost model {name!r}: neither a file nor one of {known}")
    return CostModel.load(path)
