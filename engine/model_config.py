"""ModelConfig: a checkpoint's config.json as the engine needs it, whatever version of transformers wrote it. No torch.

config.json, generation_config.json ─► defaults of the architecture ─► checks ─► ModelConfig
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..protocol.errors import CheckpointError, UnsupportedArchitecture
from .checkpoint import read_json
from .quantization import Quantization, read_quantization


class Family(NamedTuple):
    """The values that transformers' configuration class of an architecture assumes if config.json has none."""

    defaults: Mapping[str, Any]
    qkv_bias: bool | None = None  # None: as attention_bias says
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family({"max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, "use_sliding_window": True}, qkv_bias=False
    ),
    "Qwen2ForCausalLM": Family({"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}, qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}, qk_norm=True
    ),
    "MixtralForCausalLM": Family(
        {
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "use_sliding_window": True, "num_experts": 8, "num_experts_per_tok": 2,
        },
        qkv_bias=False,
    ),
    "Qwen3MoeForCausalLM": Family(
        {
            "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096,
            "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False, "moe_intermediate_size": 768,
        },
        qk_norm=True,
    ),
}  # fmt: skip
MIXTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """kind "linear": positions divided by factor; "llama3", "yarn": low frequencies divided by factor, the middle blended."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    """yarn: a frequency that turns so many times in the original length is kept; one that turns beta_slow times is divided by factor."""
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: the blend begins and ends at whole indices of frequencies."""
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it."""


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """Layers whose MLP is a mixture of experts: a router gives each token a few of them, each with a weight."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    """Of each expert."""
    is_normalized: bool
    """A token's weights add up to 1; else they are the softmax over all experts as it is."""
    layers: tuple[int, ...]
    """Indices of these layers; the others have a dense MLP."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int
    """0: no window. Else a query at position i sees keys j with i - window < j <= i."""
    layer_windows: tuple[int, ...]
    """sliding_window of each layer, because some models mix full and sliding layers."""
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    torch_dtype: str
    """Of the checkpoint: float32, float16 or bfloat16."""
    quantization: Quantization | None
    """Of the checkpoint's matrices; None: there is none."""
    mixture: MixtureConfig | None = None
    """None: every layer's MLP is dense."""

    def has_experts(self, layer: int) -> bool:
        return self.mixture is not None and layer in self.mixture.layers

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Raises CheckpointError for a missing or wrong config.json, UnsupportedArchitecture for a model that the engine can't run."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"no model folder at {folder}; name a folder with config.json and *.safetensors")
        return _Reader(folder, read_json(folder / "config.json")).read()


_ROPE_NEEDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}


def _yarn(rope: Mapping[str, Any], original: int) -> RopeScaling:
    """As transformers reads it (modeling_rope_utils.py), DeepSeek's mscale included."""
    factor = float(rope["factor"])

    def attention(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, mscale, mscale_all_dim = rope.get("attention_factor"), rope.get("mscale"), rope.get("mscale_all_dim")
    if given is None:
        given = attention(mscale) / attention(mscale_all_dim) if mscale and mscale_all_dim else attention(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=float(given),
    )


class _Reader:
    """config.json's values over the family's defaults. Each is checked when it is read."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.path = folder / "config.json"
        self.folder = folder
        self.architecture = self._architecture(values)
        self.family = FAMILIES[self.architecture]
        if values.get("num_local_experts") is not None:  # one value by two names, as transformers has it
            values = {"num_experts": values["num_local_experts"], **values}
        self.values = {**self.family.defaults, **values}

    def read(self) -> ModelConfig:
        self._refuse_unsupported()
        num_heads = self._count("num_attention_heads")
        hidden_size = self._count("hidden_size")
        num_layers = self._count("num_hidden_layers")
        max_position_embeddings = self._count("max_position_embeddings")
        attention_bias = bool(self.values.get("attention_bias", False))
        rope_theta, rope_scaling = self._rope(max_position_embeddings)
        if rope_scaling is not None and rope_scaling.kind == "yarn":
            extended = int(rope_scaling.factor * rope_scaling.original_max_position_embeddings)
            max_position_embeddings = max(max_position_embeddings, extended)
        windows = self._layer_windows(num_layers)
        config = ModelConfig(
            architecture=self.architecture,
            vocab_size=self._count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self._count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=self._count("num_key_value_heads", num_heads),
            head_dim=self._count("head_dim", hidden_size // num_heads),
            rms_norm_eps=self._number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=attention_bias if self.family.qkv_bias is None else self.family.qkv_bias,
            o_bias=attention_bias if self.family.qkv_bias is None else False,
            mlp_bias=bool(self.values.get("mlp_bias", False)) and self.architecture == "LlamaForCausalLM",
            qk_norm=self.family.qk_norm,
            sliding_window=max(windows),
            layer_windows=windows,
            tie_word_embeddings=bool(self.values.get("tie_word_embeddings", False)),
            max_position_embeddings=max_position_embeddings,
            eos_token_ids=self._eos_token_ids(),
            bos_token_id=self.values.get("bos_token_id"),
            torch_dtype=self._dtype(),
            quantization=self._quantization(),
            mixture=self._mixture(num_layers),
        )
        if config.num_heads % config.num_kv_heads:
            self._fail(f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads {config.num_kv_heads}")
        if config.head_dim % 2:
            self._fail(f"head_dim {config.head_dim} is odd; RoPE needs an even one")
        return config

    def _architecture(self, values: dict[str, Any]) -> str:
        names = values.get("architectures") or []
        found = next((name for name in names if name in FAMILIES), None)
        if found is None:
            described = ", ".join(map(str, names)) or f"model_type {values.get('model_type')!r} and no architectures"
            raise UnsupportedArchitecture(f"{self.path} is of {described}; supported are {', '.join(FAMILIES)}", architectures=list(names))
        return found

    def _refuse_unsupported(self) -> None:
        activation = self.values.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedArchitecture(f"{self.path}: hidden_act is {activation!r}; supported is 'silu'")

    def _rope(self, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
        # transformers 5 writes one dictionary; earlier versions rope_theta beside rope_scaling (whose key was first "type")
        rope = self.values.get("rope_parameters") or {**(self.values.get("rope_scaling") or {})}
        theta = float(rope.get("rope_theta") or self.values.get("rope_theta") or 10000.0)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if float(rope.get("partial_rotary_factor") or self.values.get("partial_rotary_factor") or 1.0) != 1.0:
            raise UnsupportedArchitecture(f"{self.path}: RoPE over a part of the head is not supported")
        if kind in ("default", "dynamic"):
            return theta, None  # dynamic scaling begins beyond max_position_embeddings, which is the longest that is served
        if kind not in _ROPE_NEEDS:
            raise UnsupportedArchitecture(
                f"{self.path}: rope_type is {kind!r}; supported are 'default', 'dynamic', {', '.join(map(repr, _ROPE_NEEDS))}"
            )
        needed = _ROPE_NEEDS[kind]
        missing = [key for key in needed if not isinstance(rope.get(key), (int, float))]
        if missing:
            self._fail(f"{kind} RoPE scaling lacks {', '.join(missing)}")
        if kind == "linear":
            return theta, RopeScaling(kind, float(rope["factor"]))
        original = int(rope.get("original_max_position_embeddings") or max_position_embeddings)
        if kind == "yarn":
            return theta, _yarn(rope, original)
        factors = (float(rope[key]) for key in needed)
        return theta, RopeScaling(kind, *factors, original_max_position_embeddings=original)

    def _layer_windows(self, num_layers: int) -> tuple[int, ...]:
        window = int(self.values.get("sliding_window") or 0) if self.values.get("use_sliding_window", False) else 0
        if not window or self.architecture == "LlamaForCausalLM":
            return (0,) * num_layers
        if self.architecture in ("MistralForCausalLM", *MIXTURES):
            return (window,) * num_layers
        layer_types = self.values.get("layer_types")
        if layer_types is None:
            first_sliding = int(self.values["max_window_layers"])
            layer_types = ["sliding_attention" if layer >= first_sliding else "full_attention" for layer in range(num_layers)]
        unknown = set(layer_types) - {"sliding_attention", "full_attention"}
        if unknown or len(layer_types) != num_layers:
            self._fail(
                f"layer_types has {len(layer_types)} entries {sorted(unknown)}; needed are {num_layers} of full_ or sliding_attention"
            )
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)

    def _mixture(self, num_layers: int) -> MixtureConfig | None:
        if self.architecture not in MIXTURES:
            return None
        if self.values.get("shared_expert_intermediate_size") or self.values.get("n_shared_experts"):
            raise UnsupportedArchitecture(f"{self.path}: the model has shared experts; supported are mixtures of routed experts alone")
        dense = self.values.get("mlp_only_layers") or []
        layers = range(num_layers)
        if self.architecture == "Qwen3MoeForCausalLM":
            every = self._count("decoder_sparse_step", 1)
            layers = [layer for layer in layers if layer not in dense and (layer + 1) % every == 0]
        if not layers or self.values["num_experts"] == 0:
            return None
        width = "intermediate_size" if self.architecture == "MixtralForCausalLM" else "moe_intermediate_size"
        num_experts, num_chosen = self._count("num_experts"), self._count("num_experts_per_tok")
        if num_chosen > num_experts:
            self._fail(f"num_experts_per_tok is {num_chosen}; the layers have {num_experts} experts")
        if self.values.get("quantization_config"):
            raise UnsupportedArchitecture(f"{self.path}: experts are quantised; supported are {', '.join(DTYPES)} for a mixture of experts")
        normalized = self.architecture == "MixtralForCausalLM" or bool(self.values["norm_topk_prob"])
        return MixtureConfig(num_experts, num_chosen, self._count(width), normalized, tuple(layers))

    def _eos_token_ids(self) -> frozenset[int]:
        generation = self.folder / "generation_config.json"
        found = read_json(generation).get("eos_token_id") if generation.exists() else None
        if found is None:
            found = self.values.get("eos_token_id")
        if found is None:
            return frozenset()
        return frozenset(found if isinstance(found, list) else [found])

    def _quantization(self) -> Quantization | None:
        found = self.values.get("quantization_config")
        if not found:
            return None
        if not isinstance(found, dict):
            self._fail(f"quantization_config is a {type(found).__name__}; it must be an object")
        return read_quantization(self.path, found)

    def _dtype(self) -> str:
        # "dtype" since transformers 5, "torch_dtype" before; without either float32, as in transformers
        found = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        if found not in DTYPES:
            raise UnsupportedArchitecture(f"{self.path}: the checkpoint's dtype is {found!r}; supported are {', '.join(DTYPES)}")
        return found

    def _count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self._fail(f"{key} is {value!r}; it must be a positive integer")
        return value

    def _number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            self._fail(f"{key} is {value!r}; it must be a number of at least 0")
        return float(value)

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}")
