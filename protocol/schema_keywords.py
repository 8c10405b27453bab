"""Which keywords of JSON Schema an answer is held to. A schema that asks for another one is refused, never enforced in part.

The grammar's compiler passes over what it does not know. So each keyword that narrows a schema and has no effect there is named here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn, cast

from .errors import InvalidRequest, shown
from .schema_references import disjoint, refers_to_itself
from .schema_rules import ANNOTATIONS, DESCRIPTIONS, faults

MAX_DEPTH = 64
MAX_PAIRS = 2000
"""Of the schemas of all oneOf together."""
NOT_ENFORCED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas", "dependencies"),
    *("$dynamicRef", "$recursiveRef", "$anchor", "contentMediaType", "contentEncoding", "contentSchema"),
)
COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
"""What stands beside one of them has no effect."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")


class _Place(NamedTuple):
    schema: Any
    path: str
    depth: int


def require_enforced(schema: Any) -> None:
    """Raises InvalidRequest, naming the keyword and where it stands, for a schema that the answer would not be held to."""
    places, num_pairs = [_Place(schema, "schema", 0)], 0
    while places:
        place = places.pop()
        if isinstance(place.schema, bool):
            continue
        if not isinstance(place.schema, dict):
            _refuse(place, f"is {shown(place.schema)}; a schema is an object or a boolean")
        if place.depth > MAX_DEPTH:
            raise InvalidRequest(f"the schema is nested more than {MAX_DEPTH} deep", param="response_format")
        _require_known(place, cast(dict[str, Any], place.schema))
        places += _inside(place, cast(dict[str, Any], place.schema))
        branches = cast(dict[str, Any], place.schema).get("oneOf")
        if isinstance(branches, list):
            num_pairs += _require_disjoint(place, schema, cast(list[Any], branches))
        if num_pairs > MAX_PAIRS:
            _refuse(place, f"has a oneOf, with more than {MAX_PAIRS} pairs of schemas to be told apart; use anyOf")
    if refers_to_itself(schema):
        raise InvalidRequest("the schema refers to itself with no object or array between, so no answer is of it", param="response_format")


def without_descriptions(schema: Any) -> Any:
    """The same schema for a grammar, which is as long as what is to be enforced."""
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, value in cast(dict[str, Any], schema).items():
        if name in _MAPS and isinstance(value, dict):
            found[name] = {key: without_descriptions(inner) for key, inner in cast(dict[str, Any], value).items()}
        elif name in _LISTS and isinstance(value, list):
            found[name] = [without_descriptions(inner) for inner in cast(list[Any], value)]
        elif name not in DESCRIPTIONS:
            found[name] = without_descriptions(value) if name in _SINGLE else value
    return found


def _require_known(place: _Place, schema: dict[str, Any]) -> None:
    for name in NOT_ENFORCED:
        if name in schema:
            _refuse(place, f"has {name!r}, which is not enforced; leave it out")
    if schema.get("uniqueItems"):
        _refuse(place, "has 'uniqueItems', which is not enforced; leave it out")
    combining = [name for name in COMBINING if name in schema]
    beside = sorted(schema.keys() - ANNOTATIONS - set(combining[:1]))
    if combining and beside:
        _refuse(place, f"has {beside[0]!r} beside {combining[0]!r}, where it is not enforced; move it into the schemas there")
    if len(schema.get("allOf") or [0]) > 1:
        _refuse(place, "has an allOf of several schemas, which is not enforced; write them as one")
    for name in combining:
        if schema[name] == []:
            _refuse(place, f"has an empty {name}; name a schema")
    reference = schema.get("$ref", "#")
    if not (isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))):
        _refuse(place, f"refers to {shown(reference)}; a reference must be '#' or begin with '#/'")
    for fault in faults(schema):
        _refuse(place, fault)


def _require_disjoint(place: _Place, root: Any, branches: list[Any]) -> int:
    """How many pairs were compared. oneOf is enforced as anyOf, which is the same where no value is of two of them."""
    pairs = list(itertools.islice(itertools.combinations(range(len(branches)), 2), MAX_PAIRS + 1))
    for one, other in pairs:
        if not disjoint(root, branches[one], branches[other]):
            _refuse(
                place,
                f"has a oneOf whose schemas {one} and {other} a value may both be of, which is not enforced; use anyOf, or a property "
                "with a const of its own that each requires",
            )
    return len(pairs)


def _inside(place: _Place, schema: dict[str, Any]) -> Iterator[_Place]:
    for name in _MAPS:
        inner = schema.get(name)
        if isinstance(inner, dict):
            for key, value in cast(dict[str, Any], inner).items():
                yield _Place(value, f"{place.path}.{name}.{key}", place.depth + 1)
    for name in _LISTS:
        inner = schema.get(name)
        if isinstance(inner, list):
            for position, value in enumerate(cast(list[Any], inner)):
                yield _Place(value, f"{place.path}.{name}[{position}]", place.depth + 1)
    for name in _SINGLE:
        if name in schema:
            inner = schema[name]
            if name == "propertyNames" and isinstance(inner, dict):
                inner = {"type": "string", **cast(dict[str, Any], inner)}  # a name is nothing else
            yield _Place(inner, f"{place.path}.{name}", place.depth + 1)


def _refuse(place: _Place, what: str) -> NoReturn:
    raise InvalidRequest(f"{place.path} {what}", param="response_format")
