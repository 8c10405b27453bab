"""What a worker's work costs in seconds, as a file holds it: a profile of a cluster, or a published machine.

prefill of n new tokens behind a prefix of p     prefill_s + n·per_token_s + n·p·per_token_prefix_s + n²·per_token_squared_s
decode step of a batch                           step_s + sequences·per_sequence_s + KV tokens·per_kv_token_s
a step that does both                            the larger of step_s and the prefill's products, and the rest of either;
                                                 near their crossing more than the larger (overlap)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ....protocol.timing.step_cost import StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds, bytes and tokens of one instance (a worker, or the node that it takes up)."""

    name: str = ""
    source: str = ""
    """Where its numbers come from: measured, derived, and from what."""
    prefill_s: float = 0.0
    """Of any prefill, however short."""
    per_token_s: float
    per_token_prefix_s: float
    per_token_squared_s: float
    step_s: float
    """Of any decode step, however small its batch."""
    per_sequence_s: float
    per_kv_token_s: float
    kv_bytes_per_token: int
    num_layers: int = 1
    """A hand-off's last layer leaves when the prefill ends; the others leave under it."""
    kv_capacity_tokens: int
    """Pages of one instance."""
    cache_tokens: int
    """DRAM of one node's store."""
    ssd_tokens: int = 0
    link_bytes_per_s: float
    """Of a node, each way."""
    ssd_bytes_per_s: float = 6e9
    request_s: float = 0.0
    """Of a request's first token beside queue, prefill and transfer (calls, look-ups); keeps no worker busy."""
    overlap: float = 0.0
    """How well a mixed step's read of the weights hides under its products: it takes the power mean (read^k + products^k)^(1/k) of them,
    which is 2^(1/k) times either where they are equal, so that small chunks cost more than their tokens. 0: all of it hides."""
    own_load_bytes_per_s: float = 0.0
    """Of a prefix from the store on the worker's own node into its pages; 0: it is there at once."""
    num_cores: float = 0.0
    """Workers of one machine that compute at full speed at once, where they share its cores; 0: each has a device of its own."""

    def __post_init__(self) -> None:
        for name in ("kv_bytes_per_token", "num_layers", "kv_capacity_tokens", "link_bytes_per_s", "ssd_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a cost model needs it above 0")
        if self.overlap and self.overlap < 1.0:
            raise ValueError(f"overlap is {self.overlap}; give 1 (nothing hides) or more, or 0 where all of the read hides")

    def prefill_time(self, num_new: int, num_prefix: int) -> float:
        """Seconds to compute num_new tokens behind num_prefix, alone."""
        return self.prefill_s + num_new * (self.per_token_s + num_prefix * self.per_token_prefix_s + num_new * self.per_token_squared_s)

    def step_time(self, num_sequences: int, num_kv_tokens: int) -> float:
        """Seconds of one decode step."""
        return self.step_s + num_sequences * self.per_sequence_s + num_kv_tokens * self.per_kv_token_s

    def mixed_time(self, chunks: Iterable[tuple[int, int]], num_sequences: int, num_kv_tokens: int) -> float:
        """Seconds of a step with chunks, (new tokens, tokens before them) each, and a token of each of the sequences.

        What a step costs whatever it holds is paid once, however many chunks there are.
        """
        num_new, attention_s = 0, 0.0
        for new, prefix in chunks:
            num_new += new
            attention_s += new * (prefix * self.per_token_prefix_s + new * self.per_token_squared_s)
        if not num_new:
            return self.step_time(num_sequences, num_kv_tokens)
        products_s = self.prefill_s + num_new * self.per_token_s
        if num_sequences:
            products_s = self.overlapped(products_s)
        return products_s + attention_s + num_sequences * self.per_sequence_s + num_kv_tokens * self.per_kv_token_s

    def overlapped(self, products_s: float) -> float:
        """Of the products of a step's chunks and its read of the weights together."""
        if not self.overlap or products_s <= 0.0:
            return max(products_s, self.step_s)
        return (products_s**self.overlap + self.step_s**self.overlap) ** (1.0 / self.overlap)

    @property
    def step_cost(self) -> StepCost:
        """The same, as a worker knows it at first: it knows nothing of overlap until it has learnt from steps."""
        return StepCost(
            read_s=self.step_s,
            chunk_s=self.prefill_s,
            per_token_s=self.per_token_s,
            per_attention_s=max(self.per_token_prefix_s, 2 * self.per_token_squared_s),
            per_decode_s=self.per_sequence_s,
            per_context_s=self.per_kv_token_s,
        )

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """From YAML or JSON. Raises ConfigError: no such file, an unknown key, a wrong type, a missing key, a value out of range."""
        import yaml  # here, for the SDK installs without it; and the others for the conductor imports without grpc

        from ....protocol.config import from_mapping
        from ....protocol.errors import ConfigError

        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except FileNotFoundError as error:
            raise ConfigError(f"no cost model at {path}; check the path") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
        try:
            return from_mapping(cls, {key: _number(value) for key, value in tree.items()} if isinstance(tree, dict) else tree, "")
        except (
            TypeError,
            ValueError,
        ) as error:  # a field without a default is missing (unknown ones were refused before), or is not above 0
            raise ConfigError(f"{path} is not a cost model: {error}") from error

    def save(self, path: Path) -> None:
        """As JSON, which is YAML too."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def _number(value: object) -> object:
    """YAML 1.1 reads 2e-9 as text, for want of a dot; JSON writes numbers so."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
