"""JSON as replies have it, and JSON that was made in parts put into it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def items(values: Sequence[Any]) -> str:
    """A list's JSON without its brackets."""
    return to_json(values)[1:-1]


def spliced(value: Any, fields: Mapping[str, str]) -> str:
    """JSON of value in which the first null of each field is replaced. Quotation marks in texts are escaped, so none looks like a field."""
    reply = to_json(value)
    for name, field in fields.items():
        head, null, tail = reply.partition(f'"{name}":null')
        assert null, f"the reply has no {name} to be replaced"
        reply = f'{head}"{name}":{field}{tail}'
    return reply
