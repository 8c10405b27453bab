from __future__ import annotations

import dataclasses

import pytest

from halfmoon.protocol.errors import SchemaMismatch
from halfmoon.protocol.schema import KVSchema

SCHEMA = KVSchema(model_fingerprint="f", dtype="float16", num_layers=3, num_kv_heads=2, head_dim=8, block_size=4)


def test_bytes_follow_from_the_canonical_layout() -> None:
    assert SCHEMA.layer_bytes == 2 * 2 * 4 * 8 * 2  # k|v, heads, tokens, head_dim, bytes
    assert SCHEMA.block_bytes == 3 * SCHEMA.layer_bytes


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KVSchema)])
def test_a_difference_in_any_field_is_refused_with_both_sides(field: str) -> None:
    value = getattr(SCHEMA, field)
    other = dataclasses.replace(SCHEMA, **{field: value + 1 if isinstance(value, int) else f"{value}x"})
    with pytest.raises(SchemaMismatch) as caught:
        SCHEMA.require_equal(other, "prefill-0", "store-0")
    assert list(caught.value.fields["differing"]) == [field]
    assert str(SCHEMA) in caught.value.message and str(other) in caught.value.message
    assert other.fingerprint != SCHEMA.fingerprint


def test_a_schema_crosses_a_wire_unchanged() -> None:
    assert KVSchema.from_proto(SCHEMA.to_proto()) == SCHEMA
    SCHEMA.require_equal(KVSchema.from_proto(SCHEMA.to_proto()), "a", "b")
