"""The model in plain torch, with Hugging Face's weight names, arranged so that one compiled layer serves every row length.

ids [rows, length] ─► embedding ─► [rows·length, hidden] ─┬─ before ─► attention over rows ─► after ─┐ × layers
                                                         └──────────────────────────────────────────┘─► norm ─► logits
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; the defaults are the demo model's."""

    vocab_size: int = 2560
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500_000.0
    max_position_embeddings: int = 4096

    def hf_config(self, *, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """config.json of LlamaForCausalLM."""
        sizes = asdict(self)
        theta = sizes["rope_theta"]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
        }


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Llama's norm of a float32 residual, handed on in the dtype of the products."""
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [tokens, heads, head_dim] with half-split pairs; cos, sin [tokens, 1, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def before_attention(
    x: Tensor, weights: dict[str, Tensor], cos: Tensor, sin: Tensor, shape: Shape, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] of the residual x [tokens, hidden]."""
    normed = rms_norm(x, weights["input_layernorm"], shape.rms_norm_eps, dtype)
    joined = torch.cat((weights["q_proj"], weights["k_proj"], weights["v_proj"])).to(dtype)
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    q, k, v = F.linear(normed, joined).view(-1, heads + 2 * kv_heads, shape.head_dim).split((heads, kv_heads, kv_heads), dim=1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def after_attention(x: Tensor, attended: Tensor, weights: dict[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
    """The residual after the output projection and the gated MLP."""
    x = x + F.linear(attended, weights["o_proj"].to(dtype))
    normed = rms_norm(x, weights["post_attention_layernorm"], shape.rms_norm_eps, dtype)
    gate, up = F.linear(normed, torch.cat((weights["gate_proj"], weights["up_proj"])).to(dtype)).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, weights["down_proj"].to(dtype))


def weighted_loss(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Cross entropy of the next token, averaged with `weights`; x [tokens, hidden], targets and weights [tokens]."""
    logits = F.linear(rms_norm(x, norm, eps, dtype), embedding.to(dtype)).float()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


class Llama(nn.Module):
    """Weights under Hugging Face's names; products in `dtype`, residual and statistics in float32."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, compiled: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.weights = nn.ParameterDict({_key(name): nn.Parameter(_initial(name, size, shape)) for name, size in _sizes(shape).items()})
        self._plain = _functions(compiled=False)
        self._fast = _functions(compiled=compiled)

    def hidden(self, ids: Tensor) -> Tensor:
        """The residual after the last layer: [rows·length, hidden] of ids [rows, length]."""
        # Only training has one number of tokens a batch; other shapes would compile again each time.
        before, after, _ = self._fast if torch.is_grad_enabled() else self._plain
        rows, length = ids.shape
        cos, sin = self._angles(rows, length, ids.device)
        x = F.embedding(ids.reshape(-1), self.weights[_key("model.embed_tokens.weight")])
        for layer in range(self.shape.num_hidden_layers):
            weights = self._layer(layer)
            q, k, v = (part.view(rows, length, -1, self.shape.head_dim).transpose(1, 2)
                       for part in before(x, weights, cos, sin, self.shape, self.dtype))  # fmt: skip
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = after(x, attended.transpose(1, 2).reshape(rows * length, -1), weights, self.shape, self.dtype)
        return x

    def loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted loss of every token given those before it; weights [rows, length] weigh the token itself."""
        targets, weights = ids.roll(-1, dims=1), weights.roll(-1, dims=1)
        weights[:, -1] = 0
        final = self.weights[_key("model.norm.weight")]
        embedding = self.weights[_key("model.embed_tokens.weight")]
        flat = targets.reshape(-1), weights.reshape(-1).float()
        return self._fast[2](self.hidden(ids), final, embedding, *flat, self.shape.rms_norm_eps, self.dtype)

    @torch.no_grad()
    def predict(self, ids: Tensor) -> Tensor:
        """The most likely next token at each position: [rows, length]."""
        final = self.weights[_key("model.norm.weight")]
        normed = rms_norm(self.hidden(ids), final, self.shape.rms_norm_eps, self.dtype)
        return F.linear(normed, self.weights[_key("model.embed_tokens.weight")].to(self.dtype)).argmax(-1).view_as(ids)

    def tensors(self) -> dict[str, Tensor]:
        """The weights as a Hugging Face checkpoint names them."""
        return {name: self.weights[_key(name)].detach() for name in _sizes(self.shape)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the weights of a checkpoint. Raises KeyError naming a weight that is missing."""
        with torch.no_grad():
            for name in _sizes(self.shape):
                self.weights[_key(name)].copy_(tensors[name])

    def _layer(self, layer: int) -> dict[str, Tensor]:
        return {name.split(".")[-2]: self.weights[_key(f"model.layers.{layer}.{name}")] for name in _layer_sizes(self.shape)}

    def _angles(self, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        half = self.shape.head_dim // 2
        rates = self.shape.rope_theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), rates).repeat(rows, 1)[:, None]
        return angles.cos(), angles.sin()


def _functions(*, compiled: bool) -> tuple[Callable[..., Any], ...]:
    plain = (before_attention, after_attention, weighted_loss)
    return tuple(torch.compile(function, dynamic=False) for function in plain) if compiled else plain


def _key(name: str) -> str:
    return name.replace(".", "/")


def _layer_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def _sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_hidden_layers):
        sizes |= {f"model.layers.{layer}.{name}": size for name, size in _layer_sizes(shape).items()}
    return sizes | {"model.norm.weight": (shape.hidden_size,)}


def _initial(name: str, size: tuple[int, ...], shape: Shape) -> Tensor:
    if len(size) == 1:
        return torch.ones(size)
    spread = 0.02 if "embed" in name else size[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        spread *= (2 * shape.num_hidden_layers) ** -0.5
    return torch.randn(size) * spread
