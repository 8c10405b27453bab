"""What of a model one rank of a tensor-parallel group holds. No torch.

q, k, v, gate, up, embed_tokens, lm_head   rows by rank       what comes of them is a part of the heads, of the width, of the vocabulary
o_proj, down_proj                          columns by rank    what comes of them is a term of a sum over the ranks
their biases                               rank 0 alone       a sum has each term once
norms                                      every rank
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..protocol.errors import ConfigError
from ..protocol.schema import KVSchema
from .model_config import ModelConfig

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
COLUMNS = ("o_proj", "down_proj")
DIVIDED = ("num_kv_heads", "num_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True, slots=True)
class Shard:
    rank: int = 0
    size: int = 1

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    @property
    def adds_bias(self) -> bool:
        """Of the layers whose results are summed over the ranks."""
        return self.rank == 0

    def require_fits(self, config: ModelConfig, setting: str = "tensor_parallel") -> None:
        """Raises ConfigError where the model can't be divided. setting: the name of the option that asks for it."""
        for name, count in _divided(config).items():
            if count % self.size:
                sizes = [str(size) for size in range(1, config.num_kv_heads + 1) if fits(config, size)]
                raise ConfigError(
                    f"{setting} is {self.size}, and {name} of the model is {count}, which {self.size} does not divide; "
                    f"this model takes {', '.join(sizes)}",
                    key=setting,
                )

    def part_of(self, config: ModelConfig) -> ModelConfig:
        """The model as this rank's layers see it. Vocabulary and hidden size stay whole."""
        mixture = config.mixture
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=config.num_kv_heads // self.size,
            intermediate_size=config.intermediate_size // self.size,
            mixture=mixture and dataclasses.replace(mixture, intermediate_size=mixture.intermediate_size // self.size),
        )

    def pages_of(self, schema: KVSchema) -> KVSchema:
        """Of this rank's pages: its own heads. Stores and other workers know the whole schema alone."""
        return dataclasses.replace(schema, num_kv_heads=schema.num_kv_heads // self.size)

    def axis(self, name: str) -> int | None:
        """Along which a checkpoint's tensor is divided; None: every rank reads all of it."""
        layer, _, kind = name.rpartition(".")
        layer = layer.rpartition(".")[2]
        if self.is_whole or layer not in ROWS + COLUMNS:
            return None
        if layer in ROWS:
            return 0
        return 1 if kind == "weight" else None

    def whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a checkpoint's tensor, from that of this rank's part."""
        axis = self.axis(name)
        return tuple(count * self.size if index == axis else count for index, count in enumerate(shape))

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What of a checkpoint's tensor is this rank's. shape: of its part."""
        axis = self.axis(name)
        return tuple(
            slice(self.rank * count, (self.rank + 1) * count) if index == axis else slice(None) for index, count in enumerate(shape)
        )


def fits(config: ModelConfig, size: int) -> bool:
    return not any(count % size for count in _divided(config).values())


def _divided(config: ModelConfig) -> dict[str, int]:
    """What the ranks share, by the name that an error tells. Every rank has a part of each expert: none waits for another's experts."""
    counts = {name: getattr(config, name) for name in DIVIDED}
    return counts | ({"moe_intermediate_size": config.mixture.intermediate_size} if config.mixture else {})


WHOLE = Shard()
