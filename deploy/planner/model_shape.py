"""What of a model decides what its steps cost: from the config.json of a folder, or of one of the shapes in the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...engine.model_config import ModelConfig
from ...engine.model_flops import ModelFlops, num_parameters
from ...protocol.errors import ConfigError

SHAPES = Path(__file__).parent / "shapes"
ALIASES = {"8b": "llama-3.1-8b", "32b": "qwen3-32b", "70b": "llama-3.1-70b"}
BYTES = 2  # of a weight, and of a number in KV


@dataclass(frozen=True, slots=True)
class ModelShape:
    name: str
    flops: ModelFlops
    num_parameters: int
    embedding_len: int
    """Numbers in the embedding, of which a step reads next to nothing."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_len: int
    """Tokens of prompt and answer that the model is made for."""

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * BYTES

    @property
    def read_bytes(self) -> int:
        """Of weights, in a step."""
        return (self.num_parameters - self.embedding_len) * BYTES

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES

    @classmethod
    def of(cls, name: str, config: ModelConfig) -> ModelShape:
        embedding_len = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return cls(
            name, ModelFlops.of_model(config), num_parameters(config), embedding_len, config.num_layers, config.num_kv_heads,
            config.head_dim, config.hidden_size, config.max_position_embeddings,
        )  # fmt: skip


def shipped_shapes() -> list[str]:
    return sorted(path.name for path in SHAPES.iterdir() if path.is_dir())


def find_shape(model: str) -> ModelShape:
    """A folder with config.json, or a name: "Qwen/Qwen3-32B", "llama-3.1-8b-instruct", "70b". Raises ConfigError, CheckpointError."""
    folder = Path(model)
    if folder.is_dir():
        return ModelShape.of(folder.resolve().name, ModelConfig.from_folder(folder))
    name = model.lower().rpartition("/")[2].removeprefix("meta-").removesuffix("-instruct")
    name = ALIASES.get(name, name)
    if name not in shipped_shapes():
        raise ConfigError(f"no model {model!r}: neither a folder with config.json nor one of {', '.join(shipped_shapes())}")
    return ModelShape.of(name, ModelConfig.from_folder(SHAPES / name))
