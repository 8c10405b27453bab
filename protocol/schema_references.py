"""References of a schema, and whether an answer can be of two schemas at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

Schema = dict[str, Any]
_UNIONS = ("anyOf", "oneOf", "allOf")
_MAX_HOPS = 8


def resolved(root: Any, schema: Any) -> Any:
    """What it refers to, over a few hops. None: nothing."""
    for _ in range(_MAX_HOPS):
        if not (isinstance(schema, dict) and isinstance(reference := cast(Schema, schema).get("$ref"), str)):
            return schema
        schema = _at(root, reference)
    return None


def refers_to_itself(root: Any) -> bool:
    """Some schema is what it is by itself, with no step into an object or an array between: no answer is of it."""
    done: set[int] = set()
    for begin in _all_of(root):
        path: list[tuple[Schema, Iterator[Any]]] = [(begin, _same(root, begin))]
        on_path = {id(begin)}
        while path and id(begin) not in done:
            found = next((one for one in path[-1][1] if isinstance(one, dict) and id(one) not in done), None)
            if found is None:
                left, _ = path.pop()
                on_path.discard(id(left))
                done.add(id(left))
            elif id(found) in on_path:
                return True
            else:
                on_path.add(id(found))
                path.append((found, _same(root, found)))
    return False


def disjoint(root: Any, one: Any, other: Any, depth: int = 0) -> bool:
    """It is plain that no value is of both: by their types, fixed values, or a property that both require, or one has not."""
    one, other = resolved(root, one), resolved(root, other)
    if one is False or other is False:
        return True
    if not (isinstance(one, dict) and isinstance(other, dict)) or depth > 3:
        return False
    first, second = cast(Schema, one), cast(Schema, other)
    kinds, others = _kinds(first), _kinds(second)
    if kinds and others and not kinds & others:
        return True
    values, fixed = _values(first), _values(second)
    if values is not None and fixed is not None:
        return not values & fixed
    if kinds == others == {"object"}:
        return _no_object_is_both(root, first, second, depth) or _no_object_is_both(root, second, first, depth)
    return False


def _no_object_is_both(root: Any, one: Schema, other: Schema, depth: int) -> bool:
    properties, others = one.get("properties") or {}, other.get("properties") or {}
    closed = other.get("additionalProperties") is False and "patternProperties" not in other
    for name in one.get("required") or ():
        if closed and name not in others:
            return True
        if name in (other.get("required") or ()) and disjoint(root, properties.get(name), others.get(name), depth + 1):
            return True
    return False


def _kinds(schema: Schema) -> set[str]:
    """Empty: not known."""
    kind = schema.get("type")
    found: list[Any] = cast(list[Any], kind) if isinstance(kind, list) else [kind]
    values = schema.get("enum") if "enum" in schema else [schema["const"]] if "const" in schema else None
    if kind is None and isinstance(values, list):
        found = [_kind_of(value) for value in cast(list[Any], values)]
    if not all(isinstance(one, str) for one in found):
        return set()
    return {"number" if one == "integer" else one for one in found}


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _values(schema: Schema) -> set[tuple[str, Any]] | None:
    """The fixed values, each with its kind. None: it has others, too."""
    values = schema.get("enum") if "enum" in schema else [schema["const"]] if "const" in schema else None
    if not isinstance(values, list) or any(isinstance(value, (list, dict)) for value in cast(list[Any], values)):
        return None
    return {(_kind_of(value), value) for value in cast(list[Any], values)}


def _at(root: Any, reference: str) -> Any:
    found = root
    for name in reference.removeprefix("#").split("/")[1:]:
        if isinstance(found, list) and name.isdecimal() and int(name) < len(cast(list[Any], found)):
            found = cast(list[Any], found)[int(name)]
        elif isinstance(found, dict) and name in found:
            found = cast(Schema, found)[name]
        else:
            return None
    return found


def _same(root: Any, schema: Schema) -> Iterator[Any]:
    """The schemas that a value of this one is of, too, or may be."""
    if isinstance(schema.get("$ref"), str):
        yield _at(root, schema["$ref"])
    for name in _UNIONS:
        if isinstance(schema.get(name), list):
            yield from schema[name]


def _all_of(root: Any) -> Iterator[Schema]:
    """Every object in it: some are no schemas, and then no schema refers to them."""
    left = [root]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield cast(Schema, value)
            left += cast(Schema, value).values()
        elif isinstance(value, list):
            left += cast(list[Any], value)
