"""KVSchema: what two processes must agree on before a KV byte passes between them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

from .errors import SchemaMismatch
from .v1 import common_pb2

LAYOUT_VERSION = 1  # [layer][k|v][kv_head][token][head_dim]
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class KVSchema:
    model_fingerprint: str
    dtype: str  # a key of DTYPE_BYTES
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    layout_version: int = LAYOUT_VERSION
    scales: str = ""

    @property
    def layer_shape(self) -> tuple[int, int, int, int]:
        """Shape of one layer of one block: (K and V, heads, tokens, head_dim)."""
        return 2, self.num_kv_heads, self.block_size, self.head_dim

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block: K, then V."""
        return math.prod(self.layer_shape) * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def fingerprint(self) -> bytes:
        """16 bytes over every field; the root of block keys."""
        text = repr(dataclasses.astuple(self)).encode()
        return hashlib.blake2b(text, digest_size=16).digest()

    def require_equal(self, other: KVSchema, ours: str, theirs: str) -> None:
        """Raises SchemaMismatch that prints both sides and names the fields that differ."""
        if self == other:
            return
        pairs = zip(dataclasses.asdict(self).items(), dataclasses.asdict(other).values(), strict=True)
        differing = {name: [mine, yours] for (name, mine), yours in pairs if mine != yours}
        raise SchemaMismatch(
            f"KV formats differ in {', '.join(differing)}: {ours} has {self}, {theirs} has {other}; "
            "start both from the same model folder, dtype and block size",
            differing=differing,
        )

    def to_proto(self) -> common_pb2.KVSchema:
        return common_pb2.KVSchema(**dataclasses.asdict(self))

    @classmethod
    def from_proto(cls, message: common_pb2.KVSchema) -> KVSchema:
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})
